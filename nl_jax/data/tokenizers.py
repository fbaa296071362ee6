"""Tokenizers: text to ids and back, whole or as it streams.

`load` gives bytes (no file needed), a SentencePiece model or a tokenizer.json
of Hugging Face. Which positions are padding says `segment_ids` of a batch,
never the id: many tokenizers use 0 for a real token.
"""

import codecs
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from nl_jax import files
from nl_jax.data import errors

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UTF8_BYTES = 4
_MAX_IDS = 2**31 - 1  # They are int32, and so is their number.
_PANIC = "PanicException"
# Names of the end of a document where no tokenizer_config.json says it.
_ENDS = (
  "</s>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|im_end|>",
  "<eos>",
  "[EOS]",
  "[SEP]",
)


_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")
SPECIAL = ("parse", "text")


class TextStream(Protocol):
  """Decodes ids as they come; never splits a character."""

  def push(self, ids: Iterable[int]) -> str:
    """Takes the next ids; returns the text that is certain so far."""

  def flush(self) -> str:
    """Returns what is left, at the end of the stream."""


class Tokenizer(Protocol):
  """What every tokenizer offers.

  Attributes:
    name: how a config names it.
    vocab_size: number of ids in use; a model's may be larger.
    end_id: the id that ends every document.
    pad_id: the id that fills padding, 0 where the tokenizer has none.
    begin_id: the id that begins every document; None where none does.
    fingerprint: SHA-256 (hex) of all that decides the ids.
    remark: how special tokens in a text are taken; "" where there are none.
  """

  name: str
  vocab_size: int
  end_id: int
  pad_id: int
  begin_id: int | None
  fingerprint: str
  remark: str

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids [tokens] of text, without those of its begin and end."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; end and padding have none, bad ids give U+FFFD."""

  def stream(self) -> TextStream:
    """A new incremental decoder."""


class Bytes:
  """UTF-8 bytes as tokens: id = byte + 3; 0 padding, 1 end, 2 unknown."""

  name = "bytes"
  vocab_size = 259
  end_id = 1
  pad_id = 0
  begin_id: int | None = None
  remark = ""
  fingerprint = hashlib.sha256(b"id = byte + 3, 1 end").hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids [bytes of text]."""
    content = np.frombuffer(text.encode("utf-8"), np.uint8)
    return content.astype(np.int32) + 3

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; broken UTF-8 and unknown ids become U+FFFD."""
    return self.to_bytes(ids).decode("utf-8", errors="replace")

  def to_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes of ids; those of U+FFFD for ids that stand for no byte."""
    return b"".join(map(_byte_of, ids))

  def stream(self) -> TextStream:
    """A new incremental decoder."""
    return _ByteStream(self)


class SentencePiece:
  """A SentencePiece model; ids as they are in the file.

  Args:
    path: a `.model` file.
    bos: whether documents begin with the model's begin id.

  Raises:
    FileNotFoundError: nothing at path.
    ValueError: not a SentencePiece model, one without an end id, or without a
      begin id that is asked for.
  """

  remark = ""

  def __init__(self, path: str, *, bos: bool = False):
    import sentencepiece  # Not part of the base install.

    file = files.expand(path)
    if not file.is_file():
      raise FileNotFoundError(
        f"no tokenizer file at data.tokenizer={path!r}; give the path of a "
        "SentencePiece .model file or a tokenizer.json, or bytes"
      )
    content = file.read_bytes()
    self._pieces = sentencepiece.SentencePieceProcessor()
    try:
      self._pieces.LoadFromSerializedProto(content)
    except RuntimeError:
      content = b""
    if not content:
      raise ValueError(
        f"data.tokenizer={path!r} is not a SentencePiece model; give a .model "
        "file, or bytes"
      )
    self.name = str(path)
    self.vocab_size = self._pieces.get_piece_size()
    self.end_id = self._pieces.eos_id()
    self.pad_id = max(0, self._pieces.pad_id())
    self.fingerprint = hashlib.sha256(content).hexdigest()
    self.begin_id = None
    if bos:
      self.begin_id = self._pieces.bos_id()
      if self.begin_id < 0:
        raise _no_begin(path)
      self.fingerprint = _changed(self.fingerprint, "begin")
    if self.end_id < 0:
      raise ValueError(
        f"data.tokenizer={path!r} has no end id; train the SentencePiece model "
        "with eos_id >= 0"
      )

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids [pieces of text]."""
    return np.asarray(self._pieces.encode(text), np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; ids beyond the vocabulary count as unknown."""
    unknown = self._pieces.unk_id()
    known = (int(i) if 0 <= i < self.vocab_size else unknown for i in ids)
    return self._pieces.decode(list(known))

  def is_byte(self, token: int) -> bool:
    """Whether an id stands for one byte, not for a piece of text."""
    return 0 <= token < self.vocab_size and self._pieces.is_byte(int(token))

  def anchor(self) -> int:
    """An id of plain text without a space, to be read before others."""
    for token in range(self.vocab_size):
      text = self._pieces.id_to_piece(token)
      special = self._pieces.is_control(token) or self._pieces.is_byte(token)
      if not special and text.isalnum() and self.decode([token]) == text:
        return token
    raise ValueError(f"data.tokenizer={self.name!r} has no plain text piece")

  def stream(self) -> TextStream:
    """A new incremental decoder."""
    return _PieceStream(self)


class HuggingFace:
  """A `tokenizer.json` of Hugging Face; special tokens are not added.

  The end of a document is `eos_token` of a tokenizer_config.json beside it,
  else the first usual name that the vocabulary has; its begin is `bos_token`.

  Args:
    path: the file.
    bos: whether documents begin with the begin id.
    special_tokens: "parse" those in a text, or take them as "text".

  Raises:
    ValueError: not such a file, one without an end id, or without a begin id
      that is asked for.
  """

  def __init__(
    self, path: str, *, bos: bool = False, special_tokens: str = "parse"
  ):
    import tokenizers  # Not part of the base install.

    file = files.expand(path)
    content = file.read_bytes()
    _check_json(path, content)
    with _library_errors(f"data.tokenizer={path!r} is a broken tokenizer.json"):
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    padding = self._tokenizer.padding or {}
    # A file may ask for rows of one length: packing does that here.
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.name = str(path)
    self.vocab_size = max(vocabulary.values()) + 1
    if self.vocab_size > _MAX_IDS:
      raise ValueError(
        f"data.tokenizer={path!r} has the id {self.vocab_size - 1}; ids must "
        f"be below {_MAX_IDS}"
      )
    end = _named_token(file, "eos_token", _ENDS, vocabulary)
    if end is None:
      raise ValueError(
        f"data.tokenizer={path!r} has no end of document; put a "
        "tokenizer_config.json with eos_token beside it"
      )
    self.end_id = vocabulary[end]
    self.pad_id = padding.get("pad_id", vocabulary.get("<pad>", 0))
    if self.pad_id >= self.vocab_size:
      raise ValueError(
        f"data.tokenizer={path!r} pads with the id {self.pad_id}, which its "
        f"vocabulary of {self.vocab_size} ids does not have"
      )
    mark = content + b"\0" + end.encode("utf-8")
    self.fingerprint = hashlib.sha256(mark).hexdigest()
    self.begin_id = None
    if bos:
      begin = _named_token(file, "bos_token", _BEGINS, vocabulary)
      if begin is None:
        raise _no_begin(path)
      self.begin_id = vocabulary[begin]
      self.fingerprint = _changed(self.fingerprint, f"begin {begin}")
    as_text = special_tokens == "text"
    self.remark = f"special tokens are {'text' if as_text else 'parsed'}"
    if as_text:
      self._tokenizer.encode_special_tokens = True
      self.fingerprint = _changed(self.fingerprint, "special tokens as text")

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids [tokens of text]."""
    with _library_errors(f"data.tokenizer={self.name!r} cannot write a text"):
      encoded = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoded.ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; ids beyond the vocabulary become U+FFFD."""
    text, known = [], []
    for i in ids:
      if 0 <= i < self.vocab_size:
        known.append(int(i))
        continue
      text += [self._tokenizer.decode(known), _REPLACEMENT]
      known = []
    return "".join([*text, self._tokenizer.decode(known)])

  def stream(self) -> TextStream:
    """A new incremental decoder."""
    return _HuggingFaceStream(self, self._tokenizer)


def load(
  name_or_path: str, *, bos: bool = False, special_tokens: str = "parse"
) -> Tokenizer:
  """The tokenizer of the config field data.tokenizer.

  Args:
    name_or_path: "bytes", or the path of a SentencePiece `.model` file or of a
      `tokenizer.json` of Hugging Face.
    bos: whether documents begin with the token for that.
    special_tokens: of a tokenizer.json, in a text: "parse", or take as "text".

  Raises:
    ValueError: neither a known name nor a path of a tokenizer.
    FileNotFoundError: a path with nothing there.
  """
  if special_tokens not in SPECIAL:
    raise errors.unknown_name("data.special_tokens", special_tokens, SPECIAL)
  if special_tokens == "text" and not name_or_path.endswith(".json"):
    raise ValueError(
      "data.special_tokens=text applies to a tokenizer.json, got "
      f"data.tokenizer={name_or_path!r}"
    )
  if name_or_path == Bytes.name:
    if bos:
      raise _no_begin(name_or_path)
    return Bytes()
  is_file = files.expand(name_or_path).is_file()
  if name_or_path.endswith(".json") and is_file:
    return HuggingFace(name_or_path, bos=bos, special_tokens=special_tokens)
  if name_or_path.endswith((".model", ".json")) or is_file:
    return SentencePiece(name_or_path, bos=bos)
  known = (
    Bytes.name,
    "<path of a SentencePiece .model file or a tokenizer.json>",
  )
  raise errors.unknown_name("data.tokenizer", name_or_path, known)


def _no_begin(name: str) -> ValueError:
  return ValueError(
    f"data.bos needs a token that begins a text, and data.tokenizer={name!r} "
    "has none; leave data.bos away"
  )


def _changed(fingerprint: str, how: str) -> str:
  """The fingerprint of a tokenizer that is used otherwise."""
  return hashlib.sha256(f"{fingerprint}\0{how}".encode()).hexdigest()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError where a model has fewer ids than the tokenizer."""
  if vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f"model.vocab_size={vocab_size} is smaller than the "
      f"{tokenizer.vocab_size} ids of data.tokenizer={tokenizer.name!r}; set "
      f"model.vocab_size to {tokenizer.vocab_size} or more"
    )


class _ByteStream:
  """Holds back the bytes of a character until it is whole."""

  def __init__(self, tokenizer: Bytes):
    self._to_bytes = tokenizer.to_bytes
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, ids: Iterable[int]) -> str:
    return self._decoder.decode(self._to_bytes(ids))

  def flush(self) -> str:
    text = self._decoder.decode(b"", final=True)
    self._decoder.reset()
    return text


class _HuggingFaceStream:
  """The library's own incremental decoder."""

  def __init__(self, tokenizer: HuggingFace, raw: Any):
    import tokenizers

    self._make = lambda: tokenizers.decoders.DecodeStream(
      skip_special_tokens=True
    )
    self._tokenizer, self._raw = tokenizer, raw
    self._stream = self._make()
    self._held: list[int] = []

  def push(self, ids: Iterable[int]) -> str:
    return "".join(map(self._push_one, ids))

  def flush(self) -> str:
    held, self._held, self._stream = self._held, [], self._make()
    return self._tokenizer.decode(held)

  def _push_one(self, token: int) -> str:
    if not 0 <= token < self._tokenizer.vocab_size:
      return self.flush() + _REPLACEMENT
    self._held.append(int(token))
    text = self._stream.step(self._raw, int(token))
    if text is None:
      return ""
    self._held = []
    return text


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
  """What the library of tokenizers raises, as a ValueError.

  That is an Exception of no type, mostly, and where its Rust panics something
  that is not an Exception at all and has no name to catch it by.

  Args:
    what: the beginning of the sentence.
  """
  try:
    yield
  except BaseException as error:
    of_no_type = type(error) is Exception
    if not of_no_type and type(error).__name__ != _PANIC:
      if not isinstance(error, (ValueError, TypeError, OverflowError)):
        raise
    reason = " ".join(str(error).split())
    raise ValueError(f"{what} ({reason})") from error


def _check_json(path: str, content: bytes) -> None:
  """Finds the usual mistakes, in plainer words than the library's."""
  try:
    model = json.loads(content)["model"]
    known = isinstance(model["vocab"], (dict, list)) and model["vocab"]
  except (ValueError, KeyError, TypeError, RecursionError):
    known = False
  if not known:
    raise ValueError(
      f"data.tokenizer={path!r} is not a tokenizer.json of Hugging Face: it "
      "has no model with a vocab"
    )


def _named_token(
  file: pathlib.Path,
  key: str,
  usual: tuple[str, ...],
  vocabulary: dict[str, int],
) -> str | None:
  """The token that tokenizer_config.json names, or a usual one; None: none."""
  beside = file.with_name("tokenizer_config.json")
  if beside.is_file():
    try:
      said = json.loads(beside.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError, RecursionError) as error:
      raise ValueError(f"{beside} is not a JSON object ({error})") from error
    said = said.get("content") if isinstance(said, dict) else said
    if isinstance(said, str) and said in vocabulary:
      return said
  return next((token for token in usual if token in vocabulary), None)


class _PieceStream:
  """Decodes each piece after an anchor, so that its leading space stays.

  Decoding drops the space in front of a text's first word. The first ids are
  therefore held until they have text, and later ones are decoded after a
  fixed piece whose own text is cut off: constant work per id. Byte pieces wait
  until they make a character, four at most.
  """

  def __init__(self, tokenizer: SentencePiece):
    self._tokenizer = tokenizer
    self._anchor = tokenizer.anchor()
    self._anchor_length = len(tokenizer.decode([self._anchor]))
    self._started = False
    self._held: list[int] = []

  def push(self, ids: Iterable[int]) -> str:
    return "".join(map(self._push_one, ids))

  def flush(self) -> str:
    text = self._decode_held()
    self._held, self._started = [], False
    return text

  def _push_one(self, token: int) -> str:
    self._held.append(int(token))
    text = self._decode_held()
    unfinished = (
      text.endswith(_REPLACEMENT)
      and self._tokenizer.is_byte(token)
      and len(self._held) < _MAX_UTF8_BYTES
    )
    if unfinished or not (text or self._started):
      return ""
    self._held, self._started = [], True
    return text

  def _decode_held(self) -> str:
    if not self._started:
      return self._tokenizer.decode(self._held)
    text = self._tokenizer.decode([self._anchor, *self._held])
    return text[self._anchor_length :]


def _byte_of(token: int) -> bytes:
  if 3 <= token < Bytes.vocab_size:
    return bytes((int(token) - 3,))
  silent = token in (Bytes.pad_id, Bytes.end_id)
  return b"" if silent else _REPLACEMENT.encode("utf-8")
