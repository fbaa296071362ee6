"""Matrix memory: M(z) = z w, or z + z w (docs/mathematics.md 2.1).

The classic fast weight. With the `dot` objective and the raw erase it is the
delta rule; `rule.Rule` holds every other switch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nl_jax.memory import block as blocks
from nl_jax.memory import chunked
from nl_jax.memory import rule as rules
from nl_jax.memory.chunked import MemoryState as MemoryState
from nl_jax.memory.chunked import start as start


def forward(layer: rules.Layer, z: jax.Array) -> jax.Array:
  """z [..., K] -> [..., V]."""
  return layer("w", z)


def forward_residual(layer: rules.Layer, z: jax.Array) -> jax.Array:
  """z [..., K] -> z + z w; needs K = V."""
  return z + layer("w", z)


def init(
  key: jax.Array,
  heads: int,
  key_dim: int,
  value_dim: int,
  *,
  std: float = 0.05,
) -> dict[str, jax.Array]:
  """The learned start {"w": float32 [H, K, V]}, normal of the given std."""
  shape = (heads, key_dim, value_dim)
  return {"w": std * jax.random.normal(key, shape, jnp.float32)}


def _forward(residual: bool) -> rules.Forward:
  return forward_residual if residual else forward


def read(
  params: Mapping[str, jax.Array] | None,
  state: MemoryState,
  z: jax.Array,
  *,
  residual: bool = False,
) -> jax.Array:
  """Reads z [B, T, H, K] from the weights as they are now; no write."""
  return blocks.read(_forward(residual), params, state.w, z)


def update(
  params: Mapping[str, jax.Array] | None,
  state: MemoryState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  residual: bool = False,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  chunk_free: bool = False,
  run: chunked.Run | None = None,
) -> tuple[jax.Array, MemoryState, rules.Metrics]:
  """Writes and reads T tokens; arguments as `chunked.update`."""
  return chunked.update(
    _forward(residual), params, state, q, k, v, gates,
    rule=rule, segment_ids=segment_ids, at_edge=at_edge, aligned=aligned,
    chunk_free=chunk_free, run=run, name="linear",
  )  # fmt: skip
