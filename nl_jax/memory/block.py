"""A memory at the start of a chunk, as its rule and the parts of it see it."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk

Weights = Mapping[str, jax.Array]


class Block(NamedTuple):
  """A memory at the start of a chunk, and what the chunk's tokens may see.

  Leading axes are those of a chunk function: [B, H], or the heads of a kernel.

  Attributes:
    start: dict of [..., a, b], the learned start; None: memories start empty.
    w: dict of [..., a, b], the deviations from the start now.
    s: their momentum; an empty dict without.
    carried: what a window or inner Muon has from before; else empty.
    at: the chunk's tokens, see `kernels.walk.At`.
  """

  start: Weights | None
  w: Weights
  s: Weights
  carried: Weights
  at: walk.At

  def begin(self, name: str) -> jax.Array:
    """The learned start of a layer, [..., a, b]."""
    return (
      jnp.zeros_like(self.w[name]) if self.start is None else (self.start[name])
    )

  def absolute(self, name: str, deviation: jax.Array) -> jax.Array:
    """The weights of a layer from their deviation."""
    return deviation if self.start is None else self.start[name] + deviation

  def at_anchor(self, name: str, x: jax.Array) -> jax.Array:
    """x [..., C, a] through the anchor of each token's own document."""
    at, kind = self.at, "anchor"
    deviation = self.w if at.anchor is None else at.anchor
    y = at.tile.mm(x, self.absolute(name, deviation[name]), "nn", kind)
    if at.ids is None:
      return y
    own = jnp.swapaxes(at.ids, -1, -2) == 0
    if self.start is None:
      return jnp.where(own, y, 0.0)
    return jnp.where(own, y, at.tile.mm(x, self.start[name], "nn", kind))
