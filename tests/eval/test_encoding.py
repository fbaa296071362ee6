"""Strings and tokens of requests: detokeniser, pairs, truncation, windows."""

import json
import types

import numpy as np
import pytest

from nl_jax.data import tokenizers
from nl_jax.eval import encoding, evaluate, requests, special, wikitext
from tests.eval import documents


def protocol(**values):
  return encoding.Protocol(**{
    "max_length": 64, "window": 64, "prefix_id": 1, **values,
  })  # fmt: skip


@pytest.mark.parametrize("page,text", [
  (' = Foo Bar = \n \n He said , " it \'s 3 @.@ 5 @-@ inch ( wide ) " . \n',
   ' = Foo Bar =\n\nHe said, "it\'s 3.5-inch (wide)".\n'),
  ("the dogs ' tails ; N = 5 : a , b . C ! D ? E",
   "the dogs' tails; 1 = 5: a, b. C! D? E"),
  ("5 ° C , 1 @,@ 000 [ a ] { b }", "5°C, 1,000 [a] {b}"),
])  # fmt: skip
def test_detokeniser(page, text):
  assert wikitext.detokenise(page) == text


def test_words_count_the_empty_ends():
  assert wikitext.words(" a b \n") == 4


def test_hellaswag_keeps_the_space_of_a_leading_mark():
  doc = {"activity_label": "[header] How", "ctx_a": "to [title] Boil.",
         "ctx_b": "[step] Put", "endings": ["a  b   c"] * 4,
         "label": "0"}  # fmt: skip
  choices = requests.TASKS["hellaswag"].choices(doc)
  assert choices.contexts[0] == " How: to. Boil. put"
  assert choices.choices[0] == "a b  c"  # Two spaces to one, once.


def test_windows_of_the_specification():
  cut = lambda n: [
    (list(a), list(b)) for a, b in encoding.windows(range(n), 4, "P")
  ]
  assert cut(10) == [
    (["P"], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])
  ]  # fmt: skip
  assert cut(8) == [(["P"], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]
  assert cut(0) == []


def test_every_token_of_a_page_is_a_target_once():
  rng = np.random.default_rng(0)
  for _ in range(200):
    n, length = rng.integers(1, 60), int(rng.integers(1, 20))
    tokens = list(range(n))
    targets = []
    for context, asked in encoding.windows(tokens, length, -1):
      assert 1 <= len(context) + len(asked) - 1 <= length
      before = targets[-len(context) :] if targets else [-1]
      assert list(context) == before
      targets += asked
    assert targets == tokens


def test_the_spaces_at_a_contexts_end_go_to_the_continuation():
  pair = encoding.pair("ab \n", " c", tokenizers.Bytes(), protocol())
  assert [len(x) for x in pair] == [2, 4]
  assert tokenizers.Bytes().decode(pair[1]) == " \n c"


def test_an_empty_context_is_the_prefix():
  pair = encoding.pair("  ", "c", tokenizers.Bytes(), protocol())
  assert pair[0] == [1] and len(pair[1]) == 3


def test_a_continuation_without_tokens_is_refused(tmp_path):
  joins = types.SimpleNamespace(encode=lambda text: np.zeros(1, np.int32))
  with pytest.raises(ValueError, match="this tokenizer joins them"):
    encoding.pair("a", " b", joins, protocol())


def test_truncation_is_from_the_left_and_keeps_the_targets():
  cut = encoding.left_truncate
  assert cut([1, 2, 3], [4, 5], 4) == ([1, 2, 3], False)
  assert cut([1, 2, 3], [4, 5], 3) == ([2, 3], True)
  assert cut([1, 2, 3], [4, 5, 6], 3) == ([3], True)
  with pytest.raises(ValueError, match="4 tokens, more than max_length=3"):
    cut([1], [2, 3, 4, 5], 3)


def test_bos_always_is_before_pairs_and_pages():
  always = protocol(bos="always", bos_id=7, prefix_id=7)
  pair = encoding.pair("ab", " c", tokenizers.Bytes(), always)
  plain = encoding.pair("ab", " c", tokenizers.Bytes(), protocol())
  assert pair == ([7, *plain[0]], plain[1])
  page = requests.Page(0, "abc", 1, 3, 1)
  (row,) = encoding.encode([page], tokenizers.Bytes(), always).rows
  # Predicted once, from the prefix.
  assert row.inputs.tolist() == [7] and row.targets[0] == 7
  with pytest.raises(ValueError, match="bos=always needs a tokenizer"):
    protocol(bos="always")


def test_truncated_rows_are_counted_and_long_ones_named(tmp_path):
  documents.write(tmp_path, ["piqa"])
  prepare = lambda length: evaluate.prepare(
    "piqa", tmp_path, tokenizers.Bytes(), protocol(max_length=length)
  )
  assert prepare(64).rows.truncated == 0
  assert prepare(30).rows.truncated == 6
  with pytest.raises(ValueError, match=r"piqa.jsonl:1: .* 23 tokens, more"):
    prepare(22)


def test_special_ids_of_a_tokenizer_json(tmp_path):
  import tokenizers as library

  known = {"<s>": 0, "</s>": 1, "[UNK]": 2, "a": 3}
  model = library.models.WordLevel(known, unk_token="[UNK]")
  path = tmp_path / "tokenizer.json"
  library.Tokenizer(model).save(str(path))
  assert special.ids(tokenizers.load(str(path))) == (None, 2, 1)
  said = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
  made = tokenizers.load(str(path))
  assert special.ids(made) == (0, 2, 0)
  assert special.kind(made) == "huggingface"
  assert special.ids(tokenizers.Bytes()) == (None, 2, 1)


@pytest.mark.parametrize(
  "name", ["mistral_v1_32000", "sentencepiece_test_model"]
)
def test_pairs_are_sentencepieces_own(name, data_dir):
  import sentencepiece

  path = data_dir / "tokenizers" / f"{name}.model"
  if not path.is_file():
    pytest.skip(f"no {path}")
  ours = tokenizers.load(str(path))
  theirs = sentencepiece.SentencePieceProcessor()
  theirs.Load(str(path))
  assert special.ids(ours) == (1, theirs.unk_id(), 1)
  for docs in ("piqa", "boolq", "lambada_openai", "winogrande"):
    task = requests.TASKS[docs]
    asked = requests.of(task, enumerate(documents.DOCS[docs][:2]))
    for r in asked:
      bare = r.context.rstrip()
      whole = theirs.encode(r.context + r.continuation)
      inputs, targets = encoding.pair(
        r.context, r.continuation, ours, protocol()
      )
      assert inputs + targets == whole
      assert len(inputs) == len(theirs.encode(bare))
