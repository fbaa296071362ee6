"""The general delta rule, all tokens of a chunk at once, as a chunk function.

Exact: with l the running sum of the log decays since the chunk's start, a pair
s < t meets through a_t diag(exp(l_{t-1} - l_s)) b_s^T, which is the product of
a_t exp(l_{t-1}) and b_s exp(-l_s). The rows e_t = a_t S_{t-1} that the erase
writes back solve one unit lower triangular system, and then every S_t is a
known sum. exp(-l) must stay finite: it is the caller's to keep the sum of the
log decays of a chunk above -60.
"""

import functools

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk as walks


def _iota(size: int, lead: int, axis: int) -> jax.Array:
  """Row (axis 0) or column numbers, int32 [1, ..., P, P]."""
  shape = (1,) * lead + (size, size)
  return jax.lax.broadcasted_iota(jnp.int32, shape, lead + axis)


def body(
  slow: None, state: walks.State, x: dict[str, jax.Array], at: walks.At
) -> tuple[walks.State, jax.Array, None]:
  """One chunk; see `kernels.walk`.

  Rows of a chunk's products are the tokens as they erase, then as they read;
  columns what they erase, then what they write. The decays scale both, and the
  derivative of a decay is the difference of what its row and its column say,
  so these products are as precise as the solve by any policy.

  Args:
    slow: nothing.
    state: w is S [..., K, V].
    x: q, k, v, log_decay, a, b, [..., C, ·].
    at: the chunk's tokens.
  """
  del slow
  tile, S, w = at.tile, state.w, x["log_decay"]
  C, lead = w.shape[-2], w.ndim - 2
  stack = lambda x, y: jnp.concatenate([x, y], axis=-2)
  solve = functools.partial(tile.mm, kind="solve")

  ones = jnp.where(_iota(C, lead, 0) >= _iota(C, lead, 1), 1.0, 0.0)
  level = tile.mm(ones.astype(w.dtype), w, "nn", "exact")
  last = level[..., -1:, :]
  rows = stack(x["a"] * jnp.exp(level - w), x["q"] * jnp.exp(level))
  fall = jnp.exp(-level)
  columns = stack(x["b"] * fall, x["k"] * fall)
  left = jnp.exp(last - level)  # As it is: at most 1.

  t, s = _iota(2 * C, lead, 0), _iota(2 * C, lead, 1)
  seen = jnp.where(s < C, s, s - C) <= jnp.where(t < C, t - 1, t - C)
  base, kept = solve(rows, S), tile.column(jnp.exp(last)) * S
  if at.ids is not None:
    own = tile.column(at.ids)
    twice, end = stack(own, own), own[..., -1:, :]
    seen &= twice == jnp.concatenate([at.ids, at.ids], axis=-1)
    base = jnp.where(twice == 0, base, 0.0)
    left = jnp.where(own == end, left, 0.0)
    kept = jnp.where(end == 0, kept, 0.0)
  pairs = jnp.where(seen, solve(rows, columns, "nt"), 0.0)

  e = base[..., :C, :] + solve(pairs[..., :C, C:], x["v"])
  if C > 1:
    block = 1 << (C - 1).bit_length()
    e = solve(tile.inverse(pairs[..., :C, :C], block), e)
  wrote = stack(-e, x["v"])
  y = base[..., C:, :] + tile.mm(pairs[..., C:, :], wrote)
  S = kept + solve(stack(x["b"] * left, x["k"] * left), wrote, "tn")
  return walks.State(S, state.s), y, None


def _columns() -> walks.Columns:
  """Columns of S go their own ways; those of v alone make them differ."""

  def write(*of) -> tuple[walks.State, tuple, None]:
    return body(*of)[0], (), None

  def widen(slow: None, xs: dict, heads: int, count: int) -> tuple[None, dict]:
    return slow, xs | {"v": walks.wider(xs["v"], heads, count)}

  return walks.Columns(write, widen)


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
  implementation: str | None,
  spec: jax.sharding.PartitionSpec | None,
) -> tuple[jax.Array, jax.Array]:
  """The exact chunk form; arguments and results as `api.general_delta_rule`."""
  batch, tokens = q.shape[:2]
  C = 1 if tokens == 1 else chunk
  rest = [(0, 0), (0, -tokens % C)]
  places = walks.from_begins(tokens, C, begins, batch)
  xs = dict(q=q, k=k, v=v, log_decay=log_decay, a=erase[0], b=erase[1])
  pack = lambda x: jnp.pad(x.reshape(batch, tokens, -1), [*rest, (0, 0)])
  y, after, _, _ = walks.walk(
    body, None, jax.tree.map(pack, xs), places,
    state=walks.State(state, ()), group=remat_group, chunk_free=True,
    # A single token is not work for a kernel.
    implementation="xla" if tokens == 1 else implementation,
    spec=spec, name="general_delta_rule", columns=_columns(),
  )  # fmt: skip
  return y[:, :tokens].reshape(v.shape), after.w
