"""Special ids of a tokenizer that only evaluation asks for."""

import json
from typing import Any, NamedTuple

from nl_jax import files
from nl_jax.data import tokenizers


class Ids(NamedTuple):
  """Ids with a meaning.

  Attributes:
    bos: the beginning of a sequence; None where there is none.
    unknown: what unknown text becomes; None where every text is known.
    prefix: what the first token of a page follows: the beginning of a
      sequence, else the end of a document.
  """

  bos: int | None
  unknown: int | None
  prefix: int


def ids(tokenizer: Any) -> Ids:
  """The special ids of a tokenizer of `nl_jax.data.tokenizers`."""
  if isinstance(tokenizer, tokenizers.SentencePiece):
    bos, unknown = _sentencepiece(tokenizer.name)
  elif isinstance(tokenizer, tokenizers.HuggingFace):
    bos, unknown = _hugging_face(tokenizer.name)
  else:
    bos, unknown = None, 2
  return Ids(bos, unknown, tokenizer.end_id if bos is None else bos)


def kind(tokenizer: Any) -> str:
  """bytes, sentencepiece or huggingface."""
  return type(tokenizer).__name__.lower()


def _sentencepiece(path: str) -> tuple[int | None, int | None]:
  import sentencepiece  # Not part of the base install.

  pieces = sentencepiece.SentencePieceProcessor()
  pieces.Load(str(files.expand(path)))
  bos, unk = (None if i < 0 else i for i in (pieces.bos_id(), pieces.unk_id()))
  return bos, unk


def _hugging_face(path: str) -> tuple[int | None, int | None]:
  """As tokenizer_config.json beside the file names them."""
  file = files.expand(path)
  beside = file.with_name("tokenizer_config.json")
  said = {}
  if beside.is_file():
    said = json.loads(beside.read_text(encoding="utf-8"))
  content = json.loads(file.read_text(encoding="utf-8"))
  model = content["model"]
  known = model["vocab"]
  if isinstance(known, list):  # Pieces and their scores.
    known = {piece: i for i, (piece, _) in enumerate(known)}
  added = {x["content"]: x["id"] for x in content.get("added_tokens", [])}
  found = []
  for name in ("bos_token", "unk_token"):
    token = said.get(name, model.get(name))
    token = token.get("content") if isinstance(token, dict) else token
    found.append({**known, **added}.get(token))
  return found[0], found[1]
