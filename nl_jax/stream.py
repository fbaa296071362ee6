"""One model, one state: prefill, decode, sample.

A stream reads tokens through `LMState`, the state that training uses too, so
what it says equals one call over all tokens. A token costs the same however
many came before, unless the model has an unbounded attention cache.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.models import lm

# Prompts are read in pieces of these lengths, so that few shapes compile.
_PIECES = (256, 16, 1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(
  model: lm.LanguageModel, params: Any, tokens: jax.Array, state: lm.LMState
) -> tuple[jax.Array, lm.LMState]:
  """Logits after the last token [B,Vocab], and the state."""
  logits, state, _ = model.apply(params, tokens, state)
  return logits[:, -1], state


@functools.partial(jax.jit, static_argnums=(0, 4))
def _choose(
  vocab_size: int,
  logits: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  nucleus: bool,
  top_p: jax.Array,
) -> jax.Array:
  """Ids [B] from logits [B,Vocab]; temperature 0 is the most likely one."""
  logits = logits[:, :vocab_size]
  scaled = logits / jnp.maximum(temperature, 1e-6)
  if nucleus:
    order = jnp.argsort(-scaled, axis=-1)
    sorted_logits = jnp.take_along_axis(scaled, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(sorted_logits, axis=-1), axis=-1)
    # A token stays if the mass before it is below top_p: the first always.
    kept = mass - jax.nn.softmax(sorted_logits, axis=-1) < top_p
    least = jnp.min(
      jnp.where(kept, sorted_logits, jnp.inf), axis=-1, keepdims=True
    )
    scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
  drawn = jax.random.categorical(key, scaled, axis=-1)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


@dataclasses.dataclass
class Stream:
  """A model that reads on from wherever it stands.

  Attributes:
    model: a `LanguageModel`.
    params: its weights.
    state: what it has read, B rows.
    slots: tokens that an unbounded attention cache has room for; None where
      the state does not grow.
    logits: [B,Vocab] after the last token; None before the first.
  """

  model: lm.LanguageModel
  params: Any
  state: lm.LMState
  slots: int | None
  logits: jax.Array | None = None
  _seen: int = 0

  def read(self, tokens: np.ndarray) -> jax.Array:
    """Reads tokens [B,T], T >= 1 (prefill); returns the logits after them.

    Raises:
      ValueError: no token, or more than the attention cache has room for.
    """
    tokens = np.asarray(tokens, np.int32)
    length = tokens.shape[1]
    if not length:
      raise ValueError("a stream was given no token to read")
    if self.slots is not None and self._seen + length > self.slots:
      raise ValueError(
        f"the attention cache has room for {self.slots} tokens, got "
        f"{length} more after {self._seen}; start with a larger length"
      )
    at = 0
    while at < length:
      size = next(p for p in _PIECES if p <= length - at)
      self.logits, self.state = _read(
        self.model, self.params, tokens[:, at : at + size], self.state
      )
      at += size
    self._seen += length
    return self.logits

  def sample(
    self,
    tokens: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
  ) -> Iterator[np.ndarray]:
    """Draws tokens one by one, each [B], and reads each as it is drawn.

    Args:
      tokens: how many at most.
      vocab_size: ids below it are drawn: the tokenizer's.
      temperature: 0 takes the most likely token.
      top_p: mass of the most likely tokens that are drawn from.
      seed: of the draws.
      stop_id: ends the sample once every row has drawn it.

    Raises:
      ValueError: nothing read before, or settings out of range.
    """
    if self.logits is None:
      raise ValueError("a stream must read a token before it samples")
    if temperature < 0 or not 0 < top_p <= 1:
      raise ValueError(
        "temperature must be >= 0 and top_p in (0, 1], got "
        f"{temperature} and {top_p}"
      )
    key = jax.random.key(seed)
    ended = np.zeros(self.logits.shape[0], bool)
    for i in range(tokens):
      ids = np.asarray(
        _choose(
          vocab_size,
          self.logits,
          jax.random.fold_in(key, i),
          np.float32(temperature),
          top_p < 1,
          np.float32(top_p),
        )
      )
      yield ids
      ended |= ids == stop_id if stop_id is not None else False
      if ended.all() or i + 1 == tokens:
        return
      self.read(ids[:, None])


def start(
  model: lm.LanguageModel,
  params: Any,
  batch_size: int = 1,
  length: int | None = None,
) -> Stream:
  """A stream that has read nothing.

  Args:
    model: a `LanguageModel`.
    params: its weights.
    batch_size: rows B.
    length: tokens that an unbounded attention cache has room for; default
      `model.sequence_length`.
  """
  slots = None
  if model.grows:
    slots = model.sequence_length if length is None else length
  # Copied: anchors and weights start as one buffer, which cannot be donated.
  state = jax.tree.map(jnp.copy, model.init_state(params, batch_size, slots))
  return Stream(model, params, state, slots)
