"""Text from a model, as it comes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nl_jax import stream

_OPENING = 80  # Characters of a prompt taken from the data, at most.


def opening(dataset: Any) -> str:
  """A line of the held-out text that begins something: not indented."""
  text = next(iter(dataset.source.documents("validation")))
  lines = text[len(text) // 2 :].splitlines()[1:] or text.splitlines()
  known = (line for line in lines if len(line) > 8 and not line[0].isspace())
  return next(known, text)[:_OPENING]


def generate(
  reader: stream.Stream,
  tokenizer: Any,
  prompt: str,
  tokens: int,
  *,
  temperature: float = 0.9,
  top_p: float = 1.0,
  seed: int = 0,
) -> Iterator[str]:
  """Yields pieces of text that follow the prompt, each as soon as it is whole.

  Args:
    reader: the model, with what it has read.
    tokenizer: of `nl_jax.data.tokenizers`.
    prompt: read first. May be empty: then the text follows what was read
      before, and where that is nothing the tokenizer's begin id, or a line
      break. (Without a begin id, how a document begins is not a target of
      training.)
    tokens: how many at most; the end of a document ends the text.
    temperature, top_p, seed: of `stream.Stream.sample`.
  """
  is_first = reader.logits is None
  bare = is_first and tokenizer.begin_id is None
  ids = encode(tokenizer, prompt or ("\n" if bare else ""), is_first)
  if ids.size:
    reader.read(ids[None])
  pieces = tokenizer.stream()
  for drawn in reader.sample(
    tokens,
    vocab_size=tokenizer.vocab_size,
    temperature=temperature,
    top_p=top_p,
    seed=seed,
    stop_id=tokenizer.end_id,
  ):
    if drawn[0] == tokenizer.end_id:
      break
    yield pieces.push(drawn)
  yield pieces.flush()


def encode(tokenizer: Any, text: str, is_first: bool = False) -> np.ndarray:
  """The int32 ids of a text.

  Args:
    tokenizer: of `nl_jax.data.tokenizers`.
    text: the text.
    is_first: whether nothing comes before it: then it begins as documents do.

  Raises:
    ValueError: it is not UTF-8.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"the prompt is not UTF-8 at character {error.start}"
    ) from None
  ids = np.asarray(tokenizer.encode(text), np.int32)
  if not is_first or tokenizer.begin_id is None:
    return ids
  return np.concatenate([np.asarray([tokenizer.begin_id], np.int32), ids])
