"""Trains a SentencePiece model on a corpus, in bounded memory."""

import io
import pathlib
import zlib
from collections.abc import Iterable, Iterator

from nl_jax import files

SAMPLE_BYTES = 2**25  # Of lines that are learned from, about.
_MAX_LINE = 4096  # Bytes of a line; longer ones are not learned from.
_SHARES = 2**16


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
    ValueError: more pieces than the text can give, or fewer than bytes need.
  """
  import sentencepiece

  if vocab_size < 300:
    raise ValueError(
      f"--vocab_size must be at least 300 (256 are bytes), got {vocab_size}"
    )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sample(texts, size),
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
    reason = str(error).strip().splitlines()[-1]
    raise ValueError(
      f"no model of --vocab_size={vocab_size} can be trained on this text "
      f"({reason}); give fewer pieces or more text"
    ) from error
  files.write(path, model.getvalue())
  pieces = sentencepiece.SentencePieceProcessor()
  pieces.LoadFromSerializedProto(model.getvalue())
  return pieces.get_piece_size()


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
