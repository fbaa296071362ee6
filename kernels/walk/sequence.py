"""A walk whose tokens are split over devices: an exact pipeline.

Each device of the axis holds a piece of every row, whole chunks of it. Rows go
through the pieces one after the other: while a device walks its piece of one
row, the next device walks its own of the row before, from the fast weights
that it was sent.

    step        0      1      2      3      4
    device 0  row 0  row 1  row 2
    device 1         row 0  row 1  row 2
    device 2                row 0  row 1  row 2

M rows over n devices take M + n - 1 steps, in n - 1 of which a device waits.
The backward pass is the same in reverse: the gradient of the fast weights goes
back around, and what the forward walk of a row has kept is kept for each row
once, not for each step.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from nl_jax.kernels.walk import contract

# (slow, xs, places, state) -> (ys, state, edges, sums)
Run = Callable[..., tuple[Any, contract.State, Any, jax.Array | None]]


def parts(mesh: AbstractMesh, spec: P | None) -> list[int]:
  """Devices over which rows, tokens and heads are split here.

  Args:
    mesh: the mesh that is set, or an empty one.
    spec: mesh axes of [B, T, H*d].
  """
  return [math.prod(mesh.shape[n] for n in over) for over in axes(mesh, spec)]


def axes(mesh: AbstractMesh, spec: P | None) -> list[tuple[str, ...]]:
  """Mesh axes of rows, tokens and heads that are still to be split.

  Args: as `parts`.
  """
  three = (*(spec or ()), None, None, None)[:3]
  named = [
    () if a is None else (a,) if isinstance(a, str) else a for a in three
  ]
  left = set(mesh.axis_names) - set(mesh.manual_axes)
  return [tuple(name for name in over if name in left) for over in named]


class Split(NamedTuple):
  """Mesh axes of a walk whose tokens are split.

  Attributes:
    rows: of the rows; () where they do not divide over their axes.
    groups: devices over which the rows are split.
    axis: of the tokens.
    heads: of the heads; () where the walk of a device sees them all.
    names: all that `shard_map` takes.
  """

  rows: tuple[str, ...]
  groups: int
  axis: str
  heads: tuple[str, ...]
  names: set[str]


def split(mesh: AbstractMesh, spec: P, batch: int, manual: bool) -> Split:
  """How `walk`, here and in `affine`, lays its arrays on the mesh.

  Args:
    mesh, spec, manual: see `walk`.
    batch: rows.
  """
  rows, (axis,), heads = axes(mesh, spec)
  groups = parts(mesh, spec)[0]
  if batch % groups:
    rows, groups = (), 1
  if not manual:
    return Split(rows, groups, axis, (), {axis, *rows})
  every = set(mesh.axis_names) - set(mesh.manual_axes)
  return Split(rows, groups, axis, heads, every)


class _Ring(NamedTuple):
  """What is static in a pipeline.

  Attributes:
    run: see `Run`, of a device's piece of a few rows.
    axis: of the mesh.
    size: n, its devices.
  """

  run: Run
  axis: str
  size: int

  def turn(
    self, step: jax.Array, rank: jax.Array, rows: int
  ) -> tuple[jax.Array, jax.Array]:
    """The row that a device walks in a step, and whether there is one."""
    m = step - rank
    return jnp.clip(m, 0, rows - 1), (m >= 0) & (m < rows)

  def send(self, tree: Any, by: int) -> Any:
    """To the next device (by=1) or the one before (-1); the end gets 0."""
    pairs = [(i, i + by) for i in range(self.size)]
    pairs = [(i, j) for i, j in pairs if 0 <= j < self.size]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)


def walk(
  run: Run,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
  *,
  mesh: AbstractMesh,
  spec: P,
  manual: bool,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """`api.walk` of rows whose tokens are split; each begins at a chunk edge.

  Args:
    run: the walk of a device over its piece of some rows.
    slow, xs, places, state: see `api.walk`; N divides over the devices.
    mesh: the mesh that is set.
    spec: mesh axes of [B, T, H*d]; one of them splits the tokens.
    manual: `run` sees the heads of one device (a kernel), not those of all,
      which XLA splits.
  """
  rows, groups, axis, heads, names = split(
    mesh, spec, places.real.shape[0], manual
  )
  size = mesh.shape[axis]
  ring = _Ring(run, axis, size)
  # A device's rows are its steps.
  by_step = lambda x: jnp.swapaxes(x.reshape(groups, -1, *x.shape[1:]), 0, 1)
  tokens, held = P(None, rows, axis), P(None, rows)
  if heads:
    tokens, held = P(*tokens, heads), P(*held, heads)
  places_at, at_end = P(*tokens[:3]), P(axis, *held)
  shard = jax.shard_map(
    functools.partial(_pipeline, ring),
    in_specs=(P(axis), P(heads) if heads else P(), tokens, places_at, held),
    out_specs=(tokens, at_end),
    axis_names=names,
    # A kernel does not say over which axes its outputs vary.
    check_vma=False,
  )
  ys, after = shard(
    jnp.arange(size), slow, *jax.tree.map(by_step, (xs, places, state))
  )
  whole = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
  after = jax.tree.map(jax.vmap(whole), after)
  return jax.tree.map(whole, ys), *at_ends(after, places)


def at_ends(after: Any, places: contract.Places) -> tuple[Any, Any, Any]:
  """(state, edges, sums) of whole rows from those of n pieces.

  Args:
    after: the same of each piece, leaves [n, B, ...].
    places: of the rows.
  """
  state, edges, sums = after
  count, batch = jax.tree.leaves(state)[0].shape[:2]
  # The last chunk edge is in the last piece with tokens.
  real = places.real.reshape(batch, count, -1).any(axis=2)
  last = count - 1 - jnp.argmax(real[:, ::-1], axis=1)

  which = jnp.arange(count)[:, None] == last[None]

  def of_last(x: jax.Array) -> jax.Array:
    here = which.reshape(count, batch, *(1,) * (x.ndim - 2))
    return jnp.where(here, x, 0).sum(axis=0, dtype=x.dtype)

  if sums is not None:
    sums = jax.lax.stop_gradient(sums.sum(axis=0))
  state = jax.tree.map(lambda x: x[-1], state)
  return state, jax.tree.map(of_last, edges), sums


class _Leaves(NamedTuple):
  """The leaves of a tree, those with a gradient apart.

  Attributes:
    real: floating-point arrays.
    other: the rest.
    tree: the structure.
    is_real: of each leaf.
  """

  real: list[jax.Array]
  other: list[jax.Array]
  tree: Any
  is_real: tuple[bool, ...]

  def join(self, real: Iterable[jax.Array]) -> Any:
    """The tree with other real leaves."""
    real, other = iter(real), iter(self.other)
    return self.tree.unflatten(
      next(real) if r else next(other) for r in self.is_real
    )


def _apart(tree: Any) -> _Leaves:
  leaves, structure = jax.tree.flatten(tree)
  is_real = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
  chosen = lambda which: [x for x, r in zip(leaves, is_real) if r == which]
  return _Leaves(chosen(True), chosen(False), structure, is_real)


def _row(tree: Any, m: jax.Array | int) -> Any:
  """Row m of each leaf."""
  take = lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False)
  return jax.tree.map(take, tree)


def _put(buffers: Any, m: jax.Array, works: jax.Array, rows: Any) -> Any:
  """Row m of each leaf replaced, if this device works."""

  def one(buffer: jax.Array, x: jax.Array) -> jax.Array:
    x = jnp.where(works, x, _row(buffer, m))
    return jax.lax.dynamic_update_index_in_dim(buffer, x, m, 0)

  return jax.tree.map(one, buffers, rows)


def _zeros(tree: Any, *lead: int) -> Any:
  return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), tree)


def _pipeline(
  ring: _Ring,
  rank: jax.Array,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
) -> tuple[Any, Any]:
  """What one device does; leaves have an axis of M steps before rows.

  Returns:
    ys, and with an axis of 1 before: state and edges after this device's piece
    of each row, and the sums over it.
  """
  # What a chunk function reads besides its arguments has a gradient too.
  piece, besides = jax.closure_convert(
    ring.run, slow, *_row((xs, places, state), 0)
  )
  ys, *after = _rows(ring, piece, rank[0], (slow, besides), (xs, state), places)
  return ys, jax.tree.map(lambda x: x[None], tuple(after))


def _rows(
  ring: _Ring,
  piece: Callable[..., Any],
  rank: jax.Array,
  fixed: Any,
  stepped: Any,
  places: contract.Places,
) -> tuple[Any, Any, Any, Any]:
  """(ys, state, edges, sums) of all rows, leaves [M, ...].

  Args:
    ring: see its type.
    piece: `ring.run`, and it takes `besides`.
    rank: of this device.
    fixed: (slow, besides), for all rows.
    stepped: (xs, what the first device begins from), leaves [M, ...].
    places: leaves [M, ...].
  """
  steps = places.real.shape[0]
  turns = np.arange(steps + ring.size - 1)
  made: dict[str, Any] = {}  # Structures that tracing finds.

  def walk_one(keep: bool, fixed: Any, x: Any, place: Any, before: Any) -> Any:
    """A step's walk, and what its backward pass needs."""
    own = _apart((fixed, x, before))

    def run(real: list[jax.Array]) -> Any:
      (slow, besides), x, before = own.join(real)
      out = piece(slow, x, place, before, *besides)
      return tuple(_apart(tree).real for tree in out[:3]), out

    if not keep:
      return run(own.real)[1], []
    _, pull, out = jax.vjp(run, own.real, has_aux=True)
    kept, made["pull"] = jax.tree.flatten(pull)
    return out, kept

  def forward(keep: bool, rank, fixed, stepped, places) -> Any:
    do = functools.partial(walk_one, keep, fixed)

    def step(held: Any, turn: Any) -> Any:
      arrived, out = held
      m, works = ring.turn(turn, rank, steps)
      (x, start), place = _row((stepped, places), m)
      pick = lambda own, sent: jnp.where(rank == 0, own, sent)
      before = jax.tree.map(pick, start, arrived)
      done = jax.lax.cond(works, do, lambda *_: _zeros(like), x, place, before)
      return (ring.send(done[0][1], 1), _put(out, m, works, done)), None

    (x, start), place = _row((stepped, places), 0)
    like = jax.eval_shape(do, x, place, start)
    held = _zeros(start), _zeros(like, steps)
    (_, out), _ = jax.lax.scan(step, held, turns)
    return out

  @jax.custom_vjp
  def through(rank, fixed, stepped, places) -> Any:
    return forward(False, rank, fixed, stepped, places)[0]

  def keeping(rank, fixed, stepped, places) -> Any:
    out, kept = forward(True, rank, fixed, stepped, places)
    return out, (rank, kept, fixed, stepped)

  def back(saved: Any, cotangents: Any) -> Any:
    rank, kept, fixed, stepped = saved
    ys, ends, edges = map(_with_gradient, cotangents[:3])
    own = _apart((fixed, _row(stepped, 0)))
    count = len(_apart(fixed).real)

    def pull(kept: Any, *after: Any) -> list[jax.Array]:
      return made["pull"].unflatten(kept)(after)[0]

    def step(held: Any, turn: Any) -> Any:
      arrived, total, out = held
      m, works = ring.turn(turn, rank, steps)
      end = jax.tree.map(jnp.add, arrived, _row(ends, m))
      done = jax.lax.cond(
        works, pull, lambda *_: _zeros(own.real),
        *_row((kept, ys), m), end, _row(edges, m),
      )  # fmt: skip
      before = done[len(done) - len(end) :]
      total = jax.tree.map(jnp.add, total, done[:count])
      out = _put(out, m, works, done[count:])
      return (ring.send(before, -1), total, out), None

    rest = own.real[count:]
    held = _zeros(rest[len(rest) - len(ends) :]), _zeros(own.real[:count])
    (_, total, out), _ = jax.lax.scan(
      step, (*held, _zeros(rest, steps)), turns, reverse=True
    )
    # The other devices begin from what they were sent.
    edge = len(out) - len(ends)
    keep = lambda x: jnp.where(rank == 0, x, 0)
    out = [*out[:edge], *map(keep, out[edge:])]
    return None, _gradients(fixed, total), _gradients(stepped, out), None

  through.defvjp(keeping, back)
  return through(rank, fixed, stepped, places)


def _with_gradient(cotangents: Any) -> list[jax.Array]:
  """The cotangents of real leaves; others have none."""
  leaves = jax.tree.leaves(cotangents)
  return [x for x in leaves if x.dtype != jax.dtypes.float0]


def _gradients(tree: Any, real: Iterable[jax.Array]) -> Any:
  """A tree of the gradients of its real leaves, and none of the others."""
  real = iter(real)

  def one(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return next(real)
    return np.zeros(x.shape, jax.dtypes.float0)

  return jax.tree.map(one, tree)
