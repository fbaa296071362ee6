"""The Omega rule: a token writes the gradients of the last omega tokens.

    u_t^T delta_t  becomes  sum_{t - omega < i <= t} gamma_i u_i^T delta_i

with every gradient at the anchor of t (Atlas, arXiv 2505.23735;
docs/mathematics.md 2.3). Masked tokens do not count, and the sum stays inside
t's document. The omega - 1 tokens before a block are carried: `past_k`,
`past_v` (what was to be learned) and `past_gamma`, which is 0 where there is no
such token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.memory import block as blocks

_PAST = ("past_k", "past_v", "past_gamma")


def start(
  w: dict[str, jax.Array], omega: int, inputs: tuple[str, ...]
) -> dict[str, jax.Array]:
  """No tokens before the first.

  Args:
    w: the fast weights, dict of [B, H, a, b].
    omega: tokens in the window.
    inputs: names of layers that are fed with the key.

  Returns:
    past_k [B, H, omega - 1, K], past_v [..., V] and past_gamma [..., 1].
  """
  first = next(w[name] for name in inputs if name in w)
  last = w["w_out"] if "w_out" in w else first
  sizes = (first.shape[-2], last.shape[-1], 1)
  shape = (*first.shape[:2], omega - 1)
  return {
    name: jnp.zeros((*shape, size), first.dtype)
    for name, size in zip(_PAST, sizes)
  }


class Window(NamedTuple):
  """A block's tokens with the h = omega - 1 before it.

  Attributes:
    k, target: [..., h + C, ·].
    weights: [..., C, h + C], of the gradient of i in the write of t.
    past: what the next block has before it.
  """

  k: jax.Array
  target: jax.Array
  weights: jax.Array
  past: dict[str, jax.Array]


def extend(
  block: blocks.Block,
  k: jax.Array,
  target: jax.Array,
  gamma: jax.Array,
  omega: int,
) -> Window:
  """The window of a block.

  Args:
    block: with `start`, or what `Window.past` has, in its `carried`.
    k, target: [..., C, ·].
    gamma: [..., C, 1], from 0 to 1.
    omega: tokens in the window.
  """
  at, before = block.at, omega - 1
  rows = zip(_PAST, (k, target, gamma))
  laid = [jnp.concatenate([block.carried[name], x], -2) for name, x in rows]
  C = k.shape[-2]
  # Tokens by number, 1 the first real one of the block; the carried are 0 and
  # below. Masked tokens have no number.
  t = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0)
  s = jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)
  lower = (t >= s).reshape((1,) * (k.ndim - 2) + (C, C))
  real = at.tile.row(at.real)
  count = jnp.sum(jnp.where(lower, real, 0.0), axis=-1, keepdims=True)
  old = jax.lax.broadcasted_iota(jnp.int32, (before, 1), 0) - (before - 1)
  old = old.astype(count.dtype).reshape((1,) * (k.ndim - 2) + (before, 1))
  old = jnp.broadcast_to(old, (*count.shape[:-2], before, 1))
  lead = lambda x, head: jnp.concatenate([head, x], axis=-1)
  number = lead(at.tile.row(count), at.tile.row(old))
  there = lead(real, jnp.ones_like(at.tile.row(old)))
  back = count - number
  seen = (back >= 0) & (back < omega) & (there > 0)
  # One-hot rows: where the omega - 1 newest tokens stand.
  kept = (number == count[..., -1:, :] + old) & (there > 0)
  kept = jnp.where(kept, 1.0, 0.0).astype(k.dtype)
  past = [at.tile.mm(kept, x, "nn", "exact") for x in laid]
  if at.ids is not None:
    document = lead(at.ids, jnp.zeros_like(at.tile.row(old)))
    seen &= at.tile.column(at.ids) == document
    own = jnp.sum(kept * document, axis=-1, keepdims=True)
    past[2] = past[2] * jnp.where(own == at.ids[..., -1:], 1.0, 0.0)
  weights = jnp.where(seen, at.tile.row(laid[2]), 0.0)
  return Window(laid[0], laid[1], weights, dict(zip(_PAST, past)))


def widened(block: blocks.Block, omega: int) -> blocks.Block:
  """The block with a place for each token before it: of its own document."""
  if block.at.ids is None:
    return block
  ids = block.at.ids
  head = jnp.zeros_like(ids[..., :1])
  head = jnp.broadcast_to(head, (*ids.shape[:-1], omega - 1))
  ids = jnp.concatenate([head, ids], axis=-1)
  return block._replace(at=block.at._replace(ids=ids))


def squared_norms(
  u: jax.Array, delta: jax.Array, weights: jax.Array
) -> jax.Array:
  """|sum_i weights_ti u_i^T delta_i|^2 of every t, [..., C, 1]."""
  gram = lambda x: jnp.matmul(x, jnp.swapaxes(x, -1, -2))
  mixed = jnp.matmul(weights, gram(u) * gram(delta))
  total = jnp.sum(mixed * weights, axis=-1, keepdims=True)
  return jnp.maximum(total, 0)
