"""Walks that are affine in their fast weights, split over devices.

What a device's piece of a row does to the columns of a matrix memory is
S -> A S + N, whatever S is, where keys and gates are given and every column
learns on its own. Each device finds its A and N in one walk, from columns that
learn nothing and begin as the unit matrix; one gather shows them to all; and
each then walks from what the pieces before its own have made. Nothing waits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from nl_jax.kernels.walk import contract, sequence


class Columns(NamedTuple):
  """How a walk is asked for what it does to any fast weights.

  All leaves of the state are matrices [B, H, K, V], weights and momentum.

  Attributes:
    body: the chunk function of the columns; its outputs are not used.
    widen: (slow, xs, heads, count) -> (slow, xs) with `count` more columns
      after those of each head, which learn nothing, without a learned start.
  """

  body: contract.Body
  widen: Callable[[Any, Any, int, int], tuple[Any, Any]]


def wider(x: jax.Array, heads: int, count: int) -> jax.Array:
  """[B, T, H d] with `count` zeros after each head's d, [B, T, H (d + n)].

  Args:
    x: an input of a walk, heads packed.
    heads: H.
    count: zeros a head.
  """
  lead = x.shape[:-1]
  x = x.reshape(*lead, heads, -1)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])
  return x.reshape(*lead, -1)


def _after(piece: jax.Array, state: contract.State) -> contract.State:
  """The fast weights after a piece, see `summary`."""
  leaves = jax.tree.leaves(state)
  V = leaves[0].shape[-1]
  before = jnp.concatenate(leaves, axis=-2)
  rows = jnp.matmul(piece[..., V:], before, precision="highest")
  rows = rows + piece[..., :V]
  parts = jnp.split(rows, len(leaves), axis=-2)
  return jax.tree.unflatten(jax.tree.structure(state), parts)


def summary(
  narrow: sequence.Run,
  columns: Columns,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
) -> jax.Array:
  """What a piece does, from one walk of wider matrices.

  Args:
    narrow: the walk of `columns.body` over the piece.
    columns: see its type.
    slow, xs, places: of the piece.
    state: of the shapes of the fast weights; no number of it is read.

  Returns:
    N and A side by side, [B, H, L K, V + L K], for the L leaves of the state
    one below the other.
  """
  leaves = jax.tree.leaves(state)
  (batch, heads, K, V), dtype = leaves[0].shape, leaves[0].dtype
  count = len(leaves) * K
  unit = jnp.pad(jnp.eye(count, dtype=dtype), [(0, 0), (V, 0)])[None, None]
  unit = jnp.broadcast_to(unit, (batch, heads, *unit.shape[2:]))
  parts = jnp.split(unit, len(leaves), axis=-2)
  begin = jax.tree.unflatten(jax.tree.structure(state), parts)
  slow, xs = columns.widen(slow, xs, heads, count)
  after = narrow(slow, xs, places, begin)[1]
  return jnp.concatenate(jax.tree.leaves(after), axis=-2)


def walk(
  run: sequence.Run,
  narrow: sequence.Run,
  columns: Columns,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
  *,
  mesh: AbstractMesh,
  spec: P,
  manual: bool,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """As `sequence.walk`, but for these.

  Args:
    run, slow, xs, places, state, mesh, spec, manual: as there.
    narrow: `run` with the chunk function of `columns`.
    columns: see its type.
  """
  rows, _, axis, heads, names = sequence.split(
    mesh, spec, places.real.shape[0], manual
  )

  def piece(rank, slow, xs, places, state):
    own = summary(narrow, columns, slow, xs, places, state)
    pieces = jax.lax.all_gather(own, axis)
    step = lambda before, piece: (_after(piece, before), before)
    _, begins = jax.lax.scan(step, state, pieces)
    before = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, rank[0], keepdims=False), begins
    )
    ys, *after = run(slow, xs, places, before)
    return ys, jax.tree.map(lambda x: x[None], tuple(after))

  tokens, held = P(rows, axis, heads), P(rows, heads)
  at_end = P(axis, *held)
  shard = jax.shard_map(
    piece,
    in_specs=(P(axis), P(heads), tokens, P(rows, axis), held),
    out_specs=(tokens, at_end),
    axis_names=names,
    # A kernel does not say over which axes its outputs vary.
    check_vma=False,
  )
  ys, after = shard(jnp.arange(mesh.shape[axis]), slow, xs, places, state)
  return ys, *sequence.at_ends(after, places)
