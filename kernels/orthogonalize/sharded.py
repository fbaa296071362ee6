"""Newton-Schulz on sharded stacks: two all-to-alls and no all-gather.

A matrix that is spread over devices would be gathered in every step. Instead
the stack axis is spread over the devices (all-to-all), each runs the loop on
whole matrices, and the result goes back (docs/mathematics.md 10.1).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Entry = tuple[str, ...]
Layout = tuple[Entry, Entry, Entry]  # Mesh axes of [S, m, n], major first.


@dataclasses.dataclass(frozen=True)
class NSSharding:
  """Where Newton-Schulz runs; used under `jax.set_mesh(mesh)`.

  Attributes:
    stack_axes: mesh axes that the stack is spread over: the largest ones whose
      product is at most the number of equally shaped matrices.
    leaf_specs: `PartitionSpec`s of the leaves, a tree like the parameters or a
      callable of it; None reads them from the types of an Explicit mesh.
    long_axis: a mesh axis that the long side of the matrices stays on; the
      small Gram matrix is then summed over it in every step.
  """

  stack_axes: tuple[str, ...]
  leaf_specs: Any | Callable[[Any], Any] | None = None
  long_axis: str | None = None


def entries(spec: P, rank: int) -> tuple[Entry, ...]:
  """The mesh axes of each of `rank` array axes."""
  as_tuple = lambda e: (
    () if e is None else (e,) if isinstance(e, str) else tuple(e)
  )
  found = tuple(as_tuple(e) for e in spec)
  return found + ((),) * (rank - len(found))


def _spec(layout: Layout) -> P:
  return P(*(e[0] if len(e) == 1 else e or None for e in layout))


def _without(layout: Layout, name: str) -> Layout:
  stack, rows, columns = (tuple(a for a in e if a != name) for e in layout)
  return stack, rows, columns


def route(layout: Layout, sharding: NSSharding) -> list[Layout]:
  """Layouts on the way from the leaf's to the stack's, one mesh axis a step.

  All axes in one step would make the compiler gather. Of a tuple entry the
  minor axis leaves first, or its pieces would not be contiguous.
  """
  steps = [layout]
  waiting = list(sharding.stack_axes)
  while waiting:
    now = steps[-1]
    ready = lambda a, now=now: all(a not in e or e[-1] == a for e in now)
    name = next((a for a in waiting if ready(a)), waiting[0])
    waiting.remove(name)
    stack, m, n = _without(now, name)
    steps.append(((*stack, name), m, n))
  stack = tuple(a for a in steps[-1][0] if a in sharding.stack_axes)
  long = (sharding.long_axis,) if sharding.long_axis else ()
  last = (stack, (), long)
  return steps if steps[-1] == last else [*steps, last]


def move(x: jax.Array, spec: P) -> jax.Array:
  """x laid out as `spec` says, under Auto and Explicit meshes."""
  mesh = jax.sharding.get_abstract_mesh()
  if any(t == AxisType.Explicit for t in mesh.axis_types):
    return jax.sharding.reshard(x, spec)
  return jax.lax.with_sharding_constraint(x, spec)


def run(
  loop: Callable[..., jax.Array],
  x: jax.Array,
  layout: Layout,
  sharding: NSSharding,
) -> jax.Array:
  """`loop(stack, axis_name)` on the stack [S, m, n], laid out as `layout`.

  Raises:
    ValueError: no mesh is set, or it lacks the axes named.
  """
  mesh = jax.sharding.get_abstract_mesh()
  long = sharding.long_axis
  names = {*sharding.stack_axes, *(() if long is None else (long,))}
  if not names <= set(mesh.axis_names):
    raise ValueError(
      f"NSSharding names the mesh axes {sorted(names)}, but the current mesh "
      f"has {mesh.axis_names}; run under jax.set_mesh(mesh)"
    )
  size = x.shape[0]
  shards = math.prod(mesh.shape[a] for a in sharding.stack_axes)
  if size % shards:
    x = jnp.pad(x, ((0, -size % shards), (0, 0), (0, 0)))  # NS(0) = 0.
  steps = route(layout, sharding)
  for step in steps[1:]:
    x = move(x, _spec(step))
  spec = _spec(steps[-1])
  x = jax.shard_map(
    lambda x: loop(x, sharding.long_axis), in_specs=spec, out_specs=spec
  )(x)
  for step in reversed(steps[:-1]):
    x = move(x, _spec(step))
  return x if x.shape[0] == size else x[:size]
