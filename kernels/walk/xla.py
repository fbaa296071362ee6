"""The walk over chunks by XLA: on any platform, differentiable to any order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax.kernels.walk import contract, products


def _select(rows: jax.Array, x: Any, y: Any) -> Any:
  """x in the rows [B] that are set, y elsewhere."""
  pick = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a, b)
  return jax.tree.map(pick, x, y)


def _cleared(rows: jax.Array | None, x: Any) -> Any:
  """0 in the rows [B] that are set, x elsewhere."""
  if rows is None:
    return x
  return _select(rows, jax.tree.map(jnp.zeros_like, x), x)


def _at(
  places: contract.Places,
  heads: int,
  dtype: jnp.dtype,
  anchor: Any,
  tile: products.Tile,
) -> contract.At:
  """`At` of a chunk, from places [B] and [B,C]."""
  B, C = places.real.shape

  def wide(x: jax.Array | None, a: int, b: int) -> jax.Array:
    x = jnp.zeros((B,)) if x is None else x
    x = x.astype(dtype).reshape(B, 1, a, b)
    return jnp.broadcast_to(x, (B, heads, a, b))

  first = places.first
  return contract.At(
    real=wide(places.real, C, 1),
    ids=None if places.ids is None else wide(places.ids, 1, C),
    resets=wide(places.resets, 1, 1),
    closes=wide(places.closes, 1, 1),
    first=wide(jnp.ones((B,)) if first is None else first, 1, 1),
    anchor=anchor,
    tile=tile,
  )


def walk(
  body: contract.Body,
  slow: Any,
  xs: Any,
  places: contract.Places,
  *,
  state: contract.State,
  anchor: Any,
  heads: int,
  group: int,
  tile: products.Tile,
  name: str,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """`api.walk`; `heads` is H, and the state's type that of its weights."""
  B, N, C = places.real.shape
  dtype = state_dtype(state)
  # A copy for each row: its gradient is then summed over rows once, after the
  # scan, and not over devices in every chunk.
  slow = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (B, *x.shape)), slow)

  def chunk(carry: Any, x: Any) -> tuple[Any, Any]:
    (edge, state), (at, x) = carry, x
    edge, state = _cleared(at.resets, (edge, state))
    real = at.real[:, None, :, None]
    x = jax.tree.map(lambda x: jnp.where(real, x.astype(dtype), 0), x)
    # The edge, should this chunk stay open. After a row's last token the state
    # is at no edge.
    kept = state.w if anchor is None else edge
    if at.ids is not None:
      kept = _cleared(at.ids[:, -1] != 0, kept)
    if anchor is None:
      kept = _select(at.real.any(axis=1), kept, edge)
    now = _at(at, heads, dtype, None if anchor is None else edge, tile)
    made = contract.check(body(slow, state, x, now), state, now, name)
    state, y, sums = made
    return (_select(at.closes, state.w, kept), state), (y, sums)

  fold = lambda x: jnp.moveaxis(x.reshape(B, N, C, heads, -1), (1, 3), (0, 2))
  by_chunk = (
    jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), places),
    jax.tree.map(fold, xs),
  )
  # A chunk's intermediates are made again, and never stacked: writing those of
  # several chunks out and reading them back costs more than making them.
  again = functools.partial(jax.checkpoint, prevent_cse=False)
  run = functools.partial(jax.lax.scan, again(chunk))
  carry = (state.w if anchor is None else anchor, state)
  if (group := divisor(N, group)) == 1:
    (edges, state), (ys, sums) = run(carry, by_chunk)
  else:  # Of the states too, all but one a group are made again.
    fold = lambda x: x.reshape(N // group, group, *x.shape[1:])
    flat = lambda x: x.reshape(N, *x.shape[2:])
    grouped = jax.tree.map(fold, by_chunk)
    (edges, state), made = jax.lax.scan(again(run), carry, grouped)
    ys, sums = jax.tree.map(flat, made)

  def unfold(y: jax.Array) -> jax.Array:
    return jnp.moveaxis(y, (0, 2), (1, 3)).reshape(B, N * C, -1)

  if sums is not None:
    sums = jax.lax.stop_gradient(sums[..., 0, :])
    sums = sums.astype(jnp.float32).sum(axis=0)
  return jax.tree.map(unfold, ys), state, edges, sums


def state_dtype(state: contract.State) -> jnp.dtype:
  """The type of the fast weights."""
  types = [x.dtype for x in jax.tree.leaves(state)]
  return next(t for t in types if jnp.issubdtype(t, jnp.floating))


def divisor(n: int, most: int) -> int:
  """The largest divisor of n that is at most `most`."""
  return max(d for d in range(1, min(n, most) + 1) if n % d == 0)
