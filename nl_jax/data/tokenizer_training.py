"""Trains a SentencePiece model on a corpus, in bounded memory."""

import io
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

from nl_jax import files

SAMPLE_BYTES = 2**25  # Of lines that are learned from, about.
_MAX_LINE = 4096  # Bytes of a line; longer ones are not learned from.
_SHARES = 2**16
_LEAST = 300  # Pieces.


def train(
  texts: Iterable[str], size: int, path: pathlib.Path, vocab_size: int
) -> int:
  """Trains a byte-pair model and writes it to a new file.

  Lines are chosen by a hash of their place, so the same text gives the same
  model. Ids are those of byte configs: 0 padding, 1 end, 2 unknown; bytes that
  have no piece are pieces of their own, so every text can be written.

  Args:
    texts: documents.
    size: their bytes, about: decides the share of lines.
    path: of the model.
    vocab_size: number of pieces.

  Returns:
    The number of pieces.

  Raises:
    ValueError: more pieces than the text can give, or fewer than it needs.
    Exception: what reading the documents raised.
  """
  import sentencepiece

  if not _LEAST <= vocab_size < 2**31:
    raise ValueError(
      f"--vocab_size must be at least {_LEAST} (256 are bytes) and less than "
      f"2**31, got {vocab_size}"
    )
  model, lines = io.BytesIO(), _Lines(_sample(texts, size))
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      character_coverage=0.9995,
      max_sentence_length=_MAX_LINE,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )
  except RuntimeError as error:
    if lines.error is not None:
      raise lines.error from None
    raise ValueError(_reason(str(error), vocab_size, lines.count)) from error
  files.write(path, model.getvalue())
  pieces = sentencepiece.SentencePieceProcessor()
  pieces.LoadFromSerializedProto(model.getvalue())
  return pieces.get_piece_size()


class _Lines:
  """Lines; keeps what reading them raises, which the library would hide.

  Attributes:
    count: how many there were.
    error: that was raised.
  """

  def __init__(self, lines: Iterator[str]):
    self._lines = lines
    self.count = 0
    self.error: Exception | None = None

  def __iter__(self) -> "_Lines":
    return self

  def __next__(self) -> str:
    try:
      line = next(self._lines)
    except (ValueError, OSError) as error:
      self.error = error
      raise
    self.count += 1
    return line


def _reason(said: str, vocab_size: int, lines: int) -> str:
  """A sentence for what the library says, and what helps."""
  start = f"no model of --vocab_size={vocab_size} can be trained on this text: "
  if not lines:
    return start + (
      f"it has no line of 1 to {_MAX_LINE} bytes; give text with shorter lines"
    )
  if found := re.search(r"value <= (\d+)", said):
    fewer = f"--vocab_size={found[1]} or " if int(found[1]) >= _LEAST else ""
    return start + (
      f"it gives {found[1]} pieces at most; give {fewer}more text"
    )
  if found := re.search(r"required_chars\. \d+ vs (\d+)", said):
    return start + (
      f"its characters alone are {found[1]} pieces; give more pieces than that"
    )
  return start + " ".join(said.split())


def _sample(texts: Iterable[str], size: int) -> Iterator[str]:
  """Lines: all of a small corpus, a hashed share of a large one."""
  share = min(1.0, SAMPLE_BYTES / max(size, 1)) * _SHARES
  place = 0
  for text in texts:
    for line in text.splitlines():
      place += 1
      chosen = zlib.crc32(str(place).encode()) % _SHARES < share
      if chosen and line and len(line.encode("utf-8")) <= _MAX_LINE:
        yield line
