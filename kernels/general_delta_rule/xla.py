"""The general delta rule, all tokens of a chunk at once.

Exact: with l the running sum of the log decays since the chunk's start, a pair
s < t meets through a_t diag(exp(l_{t-1} - l_s)) b_s^T, which is the product of
a_t exp(l_{t-1}) and b_s exp(-l_s). The rows e_t = a_t S_{t-1} that the erase
writes back solve one unit lower triangular system, and then every S_t is a
known sum. exp(-l) must stay finite: it is the caller's to keep the sum of the
log decays of a chunk above -60.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import inverse


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=inverse.PRECISION)


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def general_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: tuple[jax.Array, jax.Array],
  state: jax.Array,
  begins: jax.Array | None,
  *,
  chunk: int,
  remat_group: int,
) -> tuple[jax.Array, jax.Array]:
  """The exact chunk form; arguments and results as `api.general_delta_rule`."""
  batch, tokens = q.shape[:2]
  C = min(chunk, tokens)
  count = -(-tokens // C)
  index = None
  if begins is not None:  # Documents that have begun in the call.
    index = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    last = [(0, 0), (0, count * C - tokens)]
    index = jnp.pad(index, last, mode="edge").reshape(batch, count, C)
    index = jnp.moveaxis(index, 1, 0)

  def fold(x: jax.Array) -> jax.Array:
    """[B,T,H,E] to [N,B,H,C,E]; what is behind the last token is a no-op."""
    x = jnp.pad(x, [(0, 0), (0, count * C - tokens), (0, 0), (0, 0)])
    x = x.reshape(batch, count, C, *x.shape[2:])
    return jnp.transpose(x, (1, 0, 3, 2, 4))

  def step(carry, x):
    S, before = carry
    xs, index = x
    y, S = _chunk(*xs, S, index, before)
    return (S, before if index is None else index[:, -1]), y

  group = max(g for g in range(1, remat_group + 1) if count % g == 0)
  xs = (jax.tree.map(fold, (q, k, v, log_decay, erase)), index)
  xs = jax.tree.map(
    lambda x: x.reshape(count // group, group, *x.shape[1:]), xs
  )
  walk = lambda carry, x: jax.lax.scan(step, carry, x)
  begin = (state, jnp.zeros((batch,), jnp.int32))
  walk = jax.checkpoint(walk, prevent_cse=False)
  (state, _), y = jax.lax.scan(walk, begin, xs)
  y = y.reshape(count, *y.shape[2:])
  y = jnp.transpose(y, (1, 0, 3, 2, 4)).reshape(batch, count * C, *v.shape[2:])
  return y[:, :tokens], state


def _chunk(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: tuple[jax.Array, jax.Array],
  S: jax.Array,
  index: jax.Array | None,
  before: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Reads [B,H,C,V] and the state after one chunk.

  Args:
    q, k, v, log_decay, erase: [B,H,C,·].
    S: [B,H,K,V] before it.
    index: int32 [B,C], the document of each token; None: that of S.
    before: int32 [B], the document of S.
  """
  (a, b), C = erase, q.shape[-2]
  level = jnp.cumsum(log_decay, axis=-2)
  rows = jnp.concatenate(
    [a * jnp.exp(level - log_decay), q * jnp.exp(level)], axis=-2
  )
  columns = jnp.concatenate([b, k], axis=-2) * jnp.exp(
    -jnp.concatenate([level, level], axis=-2)
  )
  lower = jnp.tril(jnp.ones((C, C), bool))
  strict = jnp.tril(lower, -1)
  seen = jnp.block([[strict, strict], [lower, lower]])[None, None]
  carried = last = jnp.ones((1, C), bool)
  if index is not None:
    same = jnp.tile(index[:, :, None] == index[:, None], (1, 2, 2))
    seen = seen & same[:, None]
    carried, last = index == before[:, None], index == index[:, -1:]
  pairs = jnp.where(seen, _matmul(rows, _transposed(columns)), 0.0)
  base = _matmul(rows, S)
  held = jnp.tile(carried, (1, 2))[:, None, :, None]
  base = jnp.where(held, base, 0.0)
  found = base[..., :C, :] + _matmul(pairs[..., :C, C:], v)
  e = _matmul(inverse.unit_lower_inverse(pairs[..., :C, :C]), found)
  wrote = jnp.concatenate([-e, v], axis=-2)
  y = base[..., C:, :] + _matmul(pairs[..., C:, :], wrote)
  # exp(l_C - l_s) as it is: at most 1.
  left = jnp.exp(level[..., -1:, :] - level) * last[:, None, :, None]
  keys = jnp.concatenate([b * left, k * left], axis=-2)
  S = jnp.where(
    carried[:, None, -1:, None],
    jnp.exp(level[..., -1, :, None]) * S,
    0.0,
  )
  return y, S + _matmul(_transposed(keys), wrote)
