"""The Omega rule: a token writes the gradients of the last omega tokens.

    u_t^T delta_t  becomes  sum_{t - omega < i <= t} gamma_i u_i^T delta_i

with every gradient at the anchor of t (Atlas, arXiv 2505.23735; model.md 2.3).
Masked tokens do not count, and the sum stays inside t's document. The omega - 1
tokens before a block are carried beside the momentum: `past_k`, `past_v` (what
was to be learned) and `past_gamma`, which is 0 where there is no such token.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments

if TYPE_CHECKING:
  from nl_jax.memory import rule as rules

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
    k, target: [B, H, h + C, ·].
    weights: [B, H, C, h + C], of the gradient of i in the write of t.
    past: what the next block has before it.
  """

  k: jax.Array
  target: jax.Array
  weights: jax.Array
  past: dict[str, jax.Array]


def extend(
  block: "rules.Block",
  k: jax.Array,
  target: jax.Array,
  gamma: jax.Array,
  omega: int,
) -> Window:
  """The window of a block.

  Args:
    block: with `start`, or what `Window.past` has, in its s.
    k, target: [B, H, C, ·].
    gamma: [B, H, C], from 0 to 1.
    omega: tokens in the window.
  """
  before = omega - 1
  rows = zip(_PAST, (k, target, gamma[..., None]))
  laid = [jnp.concatenate([block.s[name], x], axis=-2) for name, x in rows]
  # Tokens by number, 1 the first real one of the block; the carried are 0 and
  # below. Masked tokens have no number.
  count = jnp.cumsum(block.mask, axis=-1, dtype=jnp.int32)
  lead = lambda x, values: jnp.concatenate(
    [jnp.broadcast_to(values, (*x.shape[:-1], before)).astype(x.dtype), x], -1
  )
  number = lead(count, jnp.arange(1 - before, 1))
  real = lead(block.mask, True)
  back = count[..., :, None] - number[..., None, :]
  seen = (back >= 0) & (back < omega) & real[..., None, :]
  newest = count[..., -1:] + jnp.arange(1 - before, 1)[None, None]
  found = number[..., None, :] == newest[..., None]
  kept = jnp.argmax(found & real[..., None, :], axis=-1)
  past = [jnp.take_along_axis(x, kept[..., None], axis=-2) for x in laid]
  if block.segment_ids is not None:
    ids = block.segment_ids
    index = segments.running_index(ids, jnp.zeros_like(ids[..., 0]))
    document = lead(index, 0)
    seen &= index[..., :, None] == document[..., None, :]
    alive = jnp.take_along_axis(document, kept, axis=-1) == index[..., -1:]
    past[2] = jnp.where(alive[..., None], past[2], 0)
  weights = jnp.where(seen, jnp.swapaxes(laid[2], -1, -2), 0)
  return Window(laid[0], laid[1], weights, dict(zip(_PAST, past)))


def widened(block: "rules.Block", omega: int) -> "rules.Block":
  """The block with a place for each token before it: of its own document."""
  if block.carried is None:
    return block
  head = [(0, 0), (0, 0), (omega - 1, 0), (0, 0)]
  carried = jnp.pad(block.carried, head, constant_values=True)
  return block._replace(carried=carried)


def squared_norms(
  u: jax.Array, delta: jax.Array, weights: jax.Array
) -> jax.Array:
  """|sum_i weights_ti u_i^T delta_i|^2 of every t, [B, H, C]."""
  gram = lambda x: jnp.matmul(x, jnp.swapaxes(x, -1, -2))
  mixed = jnp.matmul(weights, gram(u) * gram(delta))
  return jnp.maximum(jnp.sum(mixed * weights, axis=-1), 0)
