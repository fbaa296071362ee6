"""Tokenizers: round trips, streams that never split a character, errors."""

import io
import json
import pathlib

import numpy as np
import pytest

from nl_jax.data import packing, tokenizers

_TEXTS = [
  "",
  "plain text\n\twith space  s ",
  " leading",
  "naïve façade — ünïcödé",
  "日本語のテキスト 한국어",
  "😀👩‍👩‍👧 mixed 🚀 text",
  "\x00\x01 control \x7f \ufffd replacement",
]


def _random_text(rng: np.random.Generator, size: int) -> str:
  points = rng.integers(0, [0x80, 0x800, 0xD800, 0x110000], (size, 4))
  points = rng.permuted(points, axis=1)[:, 0]
  return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def _stream(tokenizer: tokenizers.Tokenizer, ids, piece: int) -> list[str]:
  stream = tokenizer.stream()
  parts = [
    stream.push(ids[i : i + piece]) for i in range(0, max(1, len(ids)), piece)
  ]
  return [*parts, stream.flush()]


def _model(data_dir: pathlib.Path, name: str) -> tokenizers.SentencePiece:
  path = data_dir / "tokenizers" / f"{name}.model"
  if not path.is_file():
    pytest.skip(f"no {path.name} in NL_DATA/tokenizers")
  return tokenizers.load(str(path))


@pytest.fixture(params=["mistral_v1_32000", "sentencepiece_test_model"])
def pieces(request, data_dir) -> tokenizers.SentencePiece:
  return _model(data_dir, request.param)


@pytest.mark.parametrize("text", _TEXTS)
def test_bytes_round_trip(text):
  tokenizer = tokenizers.load("bytes")
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert len(ids) == len(text.encode())
  assert tokenizer.decode(ids) == text
  assert "".join(_stream(tokenizer, ids, 1)) == text


def test_bytes_ids_are_as_designed():
  tokenizer = tokenizers.Bytes()
  assert tokenizer.encode("\x00A").tolist() == [3, 68]
  assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)
  assert tokenizer.vocab_size == 259
  # A model has 320 ids, and may sample any of them.
  assert tokenizer.decode([68, 0, 1, 69]) == "AB"
  assert tokenizer.decode([68, 2, 300, 69]) == "A\ufffd\ufffdB"


@pytest.mark.parametrize("seed", range(5))
def test_bytes_round_trip_on_random_text(seed):
  rng = np.random.default_rng(seed)
  tokenizer = tokenizers.Bytes()
  text = _random_text(rng, 400)
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  for piece in (1, 2, 7):
    assert "".join(_stream(tokenizer, ids, piece)) == text


@pytest.mark.parametrize("seed", range(5))
def test_bytes_stream_equals_decode_on_random_ids(seed):
  rng = np.random.default_rng(seed)
  tokenizer = tokenizers.Bytes()
  ids = rng.integers(0, 320, 500)
  for piece in (1, 3):
    assert "".join(_stream(tokenizer, ids, piece)) == tokenizer.decode(ids)


def test_a_stream_never_shows_half_a_character():
  tokenizer = tokenizers.Bytes()
  parts = _stream(tokenizer, tokenizer.encode("a😀é"), 1)
  assert parts == ["a", "", "", "", "😀", "", "é", ""]
  assert _stream(tokenizer, tokenizer.encode("😀")[:2], 1)[-1] == "\ufffd"


def test_a_flushed_stream_starts_afresh(pieces):
  for tokenizer in (tokenizers.Bytes(), pieces):
    stream = tokenizer.stream()
    ids = tokenizer.encode("Hello world")
    for _ in range(2):
      assert stream.push(ids) + stream.flush() == "Hello world"


def test_sentencepiece_round_trip(pieces):
  for text in ("Hello world", "a b c, and so on.", "the theory of memory"):
    ids = pieces.encode(text)
    assert ids.dtype == np.int32
    assert ids.max() < pieces.vocab_size
    assert pieces.decode(ids) == text


@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_with_bytes_round_trips_everything(data_dir, seed):
  tokenizer = _model(data_dir, "mistral_v1_32000")
  text = _random_text(np.random.default_rng(seed), 200).replace("\u2581", "")
  text = text.replace("\x00", "")
  for sample in [text, *_TEXTS[:-1]]:
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


@pytest.mark.parametrize("piece", [1, 3])
def test_sentencepiece_stream_equals_decode(pieces, piece):
  random = _random_text(np.random.default_rng(piece), 100)
  for text in [*_TEXTS[:-1], "  two leading spaces", random]:
    ids = pieces.encode(text)
    assert "".join(_stream(pieces, ids, piece)) == pieces.decode(ids)


def test_sentencepiece_stream_equals_decode_on_random_pieces(pieces):
  rng = np.random.default_rng(0)
  ids = [i for i in range(pieces.vocab_size) if not pieces.is_byte(i)]
  for _ in range(20):
    sample = rng.choice(ids, 60)
    assert "".join(_stream(pieces, sample, 1)) == pieces.decode(sample)


def test_sentencepiece_stream_may_start_without_text(pieces):
  # The end id has no text: the space of the first word still has to go.
  ids = [pieces.end_id, *pieces.encode("Hello world")]
  assert "".join(_stream(pieces, ids, 1)) == pieces.decode(ids)


def test_sentencepiece_takes_any_id_a_model_may_sample(pieces):
  ids = [5, pieces.end_id, pieces.vocab_size + 7, -1, 9]
  assert isinstance(pieces.decode(ids), str)
  assert isinstance("".join(_stream(pieces, ids, 1)), str)
  assert pieces.decode([pieces.end_id]) == ""


def test_fingerprints_differ(pieces):
  prints = {tokenizers.Bytes().fingerprint, pieces.fingerprint}
  assert len(prints) == 2
  assert tokenizers.load(pieces.name).fingerprint == pieces.fingerprint


def test_unusable_tokenizers_are_refused(tmp_path: pathlib.Path):
  with pytest.raises(ValueError, match="Did you mean 'bytes'"):
    tokenizers.load("byte")
  with pytest.raises(FileNotFoundError, match="data.tokenizer='no.model'"):
    tokenizers.load("no.model")
  for content in (b"", b"not a model"):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
      tokenizers.load(str(tmp_path / "bad.model"))


def test_a_model_needs_the_tokenizers_ids():
  tokenizers.check_vocabulary(tokenizers.Bytes(), 259)
  words = "model.vocab_size=258 .* 259 ids of data.tokenizer='bytes'"
  with pytest.raises(ValueError, match=words):
    tokenizers.check_vocabulary(tokenizers.Bytes(), 258)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
  """A byte-level tokenizer.json, trained here."""
  import tokenizers as library
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = library.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<pad>", "<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  made.train_from_iterator(["the cat sat on the mat " * 9], trainer)
  path = tmp_path_factory.mktemp("words") / "tokenizer.json"
  made.save(str(path))
  return str(path)


@pytest.mark.parametrize("text", ["", "the cat", " two  spaces\n", "日本 ü"])
def test_tokenizer_json_round_trip(words, text):
  made = tokenizers.load(words)
  ids = made.encode(text)
  assert ids.dtype == np.int32 and made.decode(ids) == text
  stream = made.stream()
  assert "".join(stream.push([i]) for i in ids) + stream.flush() == text
  assert (made.end_id, made.pad_id) == (1, 0)
  assert made.end_id not in ids


def test_tokenizer_json_shows_no_half_character_and_takes_any_id(words):
  made = tokenizers.load(words)
  ids = list(made.encode("日"))
  stream = made.stream()
  assert [stream.push([i]) for i in ids[:-1]] == [""] * (len(ids) - 1)
  assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
  assert stream.push(ids) == "日"
  assert "\N{REPLACEMENT CHARACTER}" in made.decode([5, 10**6, 7])
  assert "\N{REPLACEMENT CHARACTER}" in made.stream().push([10**6])


def test_the_end_is_what_the_config_beside_it_says(words):
  path = pathlib.Path(words)
  beside = path.with_name("tokenizer_config.json")
  before = tokenizers.load(words).fingerprint
  beside.write_text('{"eos_token": {"content": "<pad>"}}')
  made = tokenizers.load(words)
  assert made.end_id == 0 and made.fingerprint != before
  for damage in (b"[", b"[" * 10**5, b"\xff", b"3"):
    beside.write_bytes(damage)
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
      tokenizers.load(words)
  beside.write_text('{"eos_token": ["</s>"]}')
  assert tokenizers.load(words).fingerprint == before
  beside.unlink()


def letters(folder, special=("<s>", "</s>")):
  """A tokenizer.json of letters, with special tokens."""
  vocabulary = {c: i for i, c in enumerate("?/<>abcs")}
  model = {"type": "WordLevel", "unk_token": "?", "vocab": vocabulary}
  added = [
    {"id": 8 + i, "content": token, "single_word": False, "lstrip": False,
     "rstrip": False, "normalized": False, "special": True}
    for i, token in enumerate(special)
  ]  # fmt: skip
  split = {"type": "Split", "pattern": {"Regex": "."}, "invert": False,
           "behavior": "Isolated"}  # fmt: skip
  path = folder / "tokenizer.json"
  path.write_text(json.dumps({
    "model": model, "added_tokens": added, "pre_tokenizer": split,
  }))  # fmt: skip
  return str(path)


def test_special_tokens_in_a_text_are_parsed_or_text(tmp_path):
  path = letters(tmp_path)
  parsed = tokenizers.load(path)
  text = tokenizers.load(path, special_tokens="text")
  assert parsed.encode("a</s>b").tolist() == [4, 9, 5]
  assert text.encode("a</s>b").tolist() == [4, 2, 1, 7, 3, 5]
  assert parsed.end_id == text.end_id == 9
  assert parsed.fingerprint != text.fingerprint
  assert parsed.remark == "special tokens are parsed"
  assert text.remark == "special tokens are text"
  with pytest.raises(ValueError, match="special_tokens=text applies to a"):
    tokenizers.load("bytes", special_tokens="text")
  with pytest.raises(ValueError, match="no data.special_tokens 'drop'"):
    tokenizers.load(path, special_tokens="drop")


def test_documents_begin_with_a_token_where_that_is_asked_for(tmp_path):
  path = letters(tmp_path)
  plain, begun = tokenizers.load(path), tokenizers.load(path, bos=True)
  assert (plain.begin_id, begun.begin_id) == (None, 8)
  assert plain.fingerprint != begun.fingerprint
  ids = [x.tolist() for x in packing.tokenize(["ab", ""], begun)]
  assert ids == [[8, 4, 5, 9], [8, 9]]
  assert packing.tokenize(["ab"], plain)[0].tolist() == [4, 5, 9]
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "c"}')
  assert tokenizers.load(path, bos=True).begin_id == 6
  letters(tmp_path, ("</s>",))
  (tmp_path / "tokenizer_config.json").unlink()
  for name in (path, "bytes"):
    with pytest.raises(ValueError, match=f"data.bos needs .*{name}' has none"):
      tokenizers.load(name, bos=True)


def test_a_sentencepiece_model_may_have_a_begin(tmp_path):
  import sentencepiece

  made = {}
  for name, begin in (("with", 3), ("without", -1)):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["the cat sat on the mat"] * 50),
      model_writer=model, model_type="bpe", vocab_size=280, pad_id=0, eos_id=1,
      unk_id=2, bos_id=begin, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / f"{name}.model").write_bytes(model.getvalue())
    made[name] = str(tmp_path / f"{name}.model")
  begun = tokenizers.load(made["with"], bos=True)
  assert begun.begin_id == 3
  assert begun.fingerprint != tokenizers.load(made["with"]).fingerprint
  with pytest.raises(ValueError, match="data.bos needs a token that begins"):
    tokenizers.load(made["without"], bos=True)


def test_a_file_that_asks_for_rows_of_one_length_is_not_obeyed(words):
  content = json.loads(pathlib.Path(words).read_text())
  content["padding"] = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
  }  # fmt: skip
  content["truncation"] = {
    "max_length": 64, "strategy": "LongestFirst", "stride": 0,
    "direction": "Right",
  }  # fmt: skip
  path = pathlib.Path(words).with_name("padded.json")
  path.write_text(json.dumps(content))
  plain, padded = tokenizers.load(words), tokenizers.load(str(path))
  for text in ("the cat", "the mat " * 99):
    np.testing.assert_array_equal(padded.encode(text), plain.encode(text))


@pytest.mark.parametrize("merges,words_of_it", [
  (["a b"], "a broken tokenizer.json .*`b` out of vocabulary"),
  ([], "has no end of document; put a tokenizer_config.json"),
])  # fmt: skip
def test_half_a_tokenizer_json_is_refused(tmp_path, merges, words_of_it):
  model = {"type": "BPE", "vocab": {"a": 0}, "merges": merges}
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps({"model": model}))
  with pytest.raises(ValueError, match=words_of_it):
    tokenizers.load(str(path))


@pytest.mark.parametrize("change,words", [
  ({"vocab": {"</s>": 0, "a": 2**31}}, "has the id 2147483648; ids must be"),
  ({"vocab": {"</s>": 0, "a": 2**32}}, "a broken tokenizer.json"),
  ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
   "a broken tokenizer.json .*Precompiled"),
  ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("},
                      "behavior": "Isolated", "invert": False}},
   "a broken tokenizer.json"),
  ({"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_id": 9,
                "pad_to_multiple_of": None, "pad_type_id": 0,
                "pad_token": "a"}},
   "pads with the id 9, which its vocabulary of 2 ids does not have"),
  ({}, "cannot write a text .*Missing .UNK."),
])  # fmt: skip
def test_what_the_library_raises_names_the_file(tmp_path, change, words):
  """As Exception of no type, as a panic of Rust, as numbers too large."""
  vocab = change.pop("vocab", {"</s>": 0, "a": 1})
  model = {"type": "WordLevel", "unk_token": "?", "vocab": vocab}
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps({"model": model, **change}))
  with pytest.raises(ValueError, match=f"tokenizer.json. .*{words}"):
    tokenizers.load(str(path)).encode("b")


@pytest.mark.parametrize("content", [
  "", "{}", "[]", '{"model": {}}', '{"model": {"vocab": {}}}', "[" * 10**5,
])  # fmt: skip
def test_json_of_something_else_is_refused(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_text(content)
  with pytest.raises(ValueError, match="is not a tokenizer.json"):
    tokenizers.load(str(path))
  with pytest.raises(FileNotFoundError, match="no tokenizer file"):
    tokenizers.load("no.json")
