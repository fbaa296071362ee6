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
  net: Any,
  params: Any,
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
    net, params: the model.
    tokenizer: of `nl_jax.data.tokenizers`.
    prompt: may be empty: then the text follows an end of document.
    tokens: how many at most; the end of a document ends the text.
    temperature, top_p, seed: of `stream.Stream.sample`.
  """
  ids = np.asarray(tokenizer.encode(prompt), np.int32)
  if not ids.size:
    ids = np.asarray([tokenizer.end_id], np.int32)
  # Beyond the trained length where that is asked for: an attention cache
  # takes any number of slots, other states need none.
  reader = stream.start(net, params, length=ids.size + tokens)
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
