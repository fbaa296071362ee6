"""Texts of different lengths read at once, each with a memory of its own.

The rows of one state are as many streams. Row for row the numbers are those of
`stream`, whatever the other rows read.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.models import lm
from nl_jax.stream import reader as streams
from nl_jax.stream import states

# Rows are read in pieces of these lengths, so that few shapes compile.
_PIECES = (256, 16)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _score(
  model: lm.LanguageModel,
  params: Any,
  tokens: jax.Array,
  real: jax.Array,
  state: lm.LMState,
  before: jax.Array,
) -> tuple[jax.Array, jax.Array, lm.LMState]:
  """As `stream`'s, of rows that end before the padding after them."""
  ids = real.astype(jnp.int32)
  logits, state, _ = model.apply(params, tokens, state, segment_ids=ids)
  ahead = jnp.concatenate([before[:, None], logits], axis=1)
  chosen = jnp.take_along_axis(ahead[:, :-1], tokens[..., None], axis=-1)
  nats = jax.nn.logsumexp(ahead[:, :-1], -1) - chosen[..., 0]
  last = jnp.sum(ids, axis=1)[:, None, None]
  after = jnp.take_along_axis(ahead, last, axis=1)[:, 0]
  return nats, after, state


def join(readers: Sequence[streams.Stream]) -> streams.Stream:
  """One stream with the rows of several, one after the other.

  Args:
    readers: of one model and its weights; those that have read nothing may be
      among them.

  Raises:
    ValueError: none, or a model whose attention keeps every token.
  """
  if not readers:
    raise ValueError("there are no streams to join")
  model = readers[0].model
  if model.grows:
    raise ValueError(
      f"model.arch={model.arch!r} keeps every token that it reads: rows of "
      "different lengths cannot share a state; use a model of memories, such "
      "as hope"
    )

  def one(path: Any, *leaves: jax.Array) -> jax.Array:
    return jnp.concatenate(leaves, axis=lm.batch_axis(path))

  state = jax.tree_util.tree_map_with_path(one, *(r.state for r in readers))
  nothing = lambda r: jnp.full(
    (r.state.position_B.shape[0], model.vocab_size), jnp.nan
  )
  logits = [nothing(r) if r.logits is None else r.logits for r in readers]
  return streams.Stream(
    model, readers[0].params, state, None, jnp.concatenate(logits)
  )


def part(reader: streams.Stream, row: int) -> streams.Stream:
  """One row of a stream as a stream of its own."""
  state = states.take(reader.state, np.array([row]))
  logits = None if reader.logits is None else reader.logits[row : row + 1]
  if logits is not None and bool(jnp.isnan(logits).any()):
    logits = None
  return streams.Stream(reader.model, reader.params, state, None, logits)


def score(
  reader: streams.Stream, texts: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Reads a text into each row, and returns the nats of its tokens.

  Args:
    reader: of `join`, as many rows as texts.
    texts: ids [T], of any length; none may be empty for a row that has read
      nothing and is to be sampled from.

  Returns:
    float32 [T] of each text; NaN for the first token of a row that had read
    nothing.

  Raises:
    ValueError: another number of texts than of rows.
  """
  rows = reader.state.position_B.shape[0]
  if len(texts) != rows:
    raise ValueError(f"{rows} rows need as many texts, got {len(texts)}")
  longest, at, scores = max(map(len, texts)), 0, []
  while at < longest:
    size = next((p for p in _PIECES if p <= longest - at), _PIECES[-1])
    tokens = np.zeros((rows, size), np.int32)
    real = np.zeros((rows, size), bool)
    for row, text in enumerate(texts):
      piece = text[at : at + size]
      tokens[row, : len(piece)], real[row, : len(piece)] = piece, True
    nats, reader.logits, reader.state = _score(
      reader.model, reader.params, tokens, real, reader.state, reader.logits
    )
    scores.append(np.asarray(nats, np.float32))
    at += size
  whole = np.concatenate(scores, axis=1) if scores else np.zeros((rows, 0))
  return [whole[row, : len(text)] for row, text in enumerate(texts)]
