"""The general delta rule, all tokens of a chunk at once, as a chunk function.

Exact: with l the running sum of the log decays since the chunk's start, a pair
s < t meets through a_t diag(exp(l_{t-1} - l_s)) b_s^T, which is the product of
a_t exp(l_{t-1}) and b_s exp(-l_s). The rows e_t = a_t S_{t-1} that the erase
writes back solve one unit lower triangular system, and then every S_t is a
known sum. exp(-l) must stay finite: it is the caller's to keep the sum of the
log decays of a chunk above -60.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk as walks


def _pairs(size: int, lead: int, strict: bool) -> jax.Array:
  """Pairs (t, s <= t), bool [1, ..., C, C]."""
  t = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  s = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return (t > s if strict else t >= s).reshape((1,) * lead + (size, size))


def body(
  slow: None, state: walks.State, x: dict[str, jax.Array], at: walks.At
) -> tuple[walks.State, jax.Array, None]:
  """One chunk; see `kernels.walk`.

  The decays scale the rows of each product over channels, and the derivative
  of a decay is the difference of what its row and its column say: such
  products are as precise as the solve by any policy.

  Args:
    slow: nothing.
    state: w is S [..., K, V].
    x: q, k, v, log_decay, a, b, [..., C, ·].
    at: the chunk's tokens.
  """
  del slow
  tile, S, w = at.tile, state.w, x["log_decay"]
  size, lead = w.shape[-2], w.ndim - 2
  strict, lower = (_pairs(size, lead, strict) for strict in (True, False))
  ones = jnp.where(lower, 1.0, 0.0).astype(w.dtype)
  level = tile.mm(ones, w, "nn", "exact")
  grow, fall = jnp.exp(level), jnp.exp(-level)
  a, q = x["a"] * jnp.exp(level - w), x["q"] * grow
  b, k = x["b"] * fall, x["k"] * fall
  held = alive = own = None
  if at.ids is not None:
    document = tile.column(at.ids)
    strict, lower = (p & (document == at.ids) for p in (strict, lower))
    held = jnp.where(document == 0, 1.0, 0.0)
    alive = held[..., -1:, :]
    own = jnp.where(document == document[..., -1:, :], 1.0, 0.0)

  def gram(rows: jax.Array, columns: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, tile.mm(rows, columns, "nt", "solve"), 0.0)

  def base(rows: jax.Array, kind: str) -> jax.Array:
    found = tile.mm(rows, S, "nn", kind)
    return found if held is None else held * found

  found = base(a, "solve") + tile.mm(gram(a, k, strict), x["v"], "nn", "solve")
  e = found
  if size > 1:
    block = 1 << (size - 1).bit_length()
    e = tile.mm(tile.inverse(gram(a, b, strict), block), found, "nn", "solve")
  y = base(q, "read") + tile.mm(gram(q, k, lower), x["v"])
  y = y - tile.mm(gram(q, b, lower), e)
  last = level[..., -1:, :]
  left = jnp.exp(last - level)  # As it is: at most 1.
  kept = tile.column(jnp.exp(last)) * S
  if own is not None:
    left, kept = left * own, alive * kept
  wrote = tile.mm(x["k"] * left, x["v"], "tn", "solve")
  erased = tile.mm(x["b"] * left, e, "tn", "solve")
  return walks.State(kept + wrote - erased, state.s), y, None


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
  count = -(-tokens // C)
  grid = (batch, count, C)
  rest = [(0, 0), (0, count * C - tokens)]
  real = jnp.arange(count * C).reshape(1, count, C) < tokens
  places = walks.Places(
    real=jnp.broadcast_to(real, grid),
    resets=None,
    closes=jnp.ones(grid[:2], bool),
  )
  if begins is not None:
    begins = jnp.pad(begins, rest).reshape(grid)
    inside = begins.at[..., 0].set(False)
    places = places._replace(
      resets=begins[..., 0],
      ids=jnp.cumsum(inside, axis=-1, dtype=jnp.int32) if C > 1 else None,
    )
  xs = dict(q=q, k=k, v=v, log_decay=log_decay, a=erase[0], b=erase[1])
  pack = lambda x: jnp.pad(x.reshape(batch, tokens, -1), [*rest, (0, 0)])
  y, after, _, _ = walks.walk(
    body, None, jax.tree.map(pack, xs), places,
    state=walks.State(state, ()), save=remat_group, chunk_free=True,
    # A single token is no work for a kernel.
    implementation="xla" if tokens == 1 else implementation,
    spec=spec, name="general_delta_rule",
  )  # fmt: skip
  return y[:, :tokens].reshape(v.shape), after.w
