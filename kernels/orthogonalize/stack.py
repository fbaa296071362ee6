"""Views of a tensor as a stack of matrices: [S, c, r] = [stack, in, out].

`optax.contrib.MuonDimensionNumbers` names the axes that make up the fan-in and
the fan-out; all other axes are batch, and every matrix stands for itself.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Dims: TypeAlias = optax.contrib.MuonDimensionNumbers
MATRIX = Dims(-2, -1)


class Axes(NamedTuple):
  """Non-negative axes of one tensor, each in the order given."""

  batch: tuple[int, ...]
  reduction: tuple[int, ...]
  output: tuple[int, ...]


def axes(shape: tuple[int, ...], dims: Dims, where: str = "") -> Axes:
  """Checks `dims` against a shape.

  Raises:
    ValueError: rank below 2, axes out of range, repeated or overlapping.
  """
  at = f" at {where}" if where else ""
  rank = len(shape)
  if rank < 2:
    raise ValueError(
      f"a matrix spec needs rank >= 2, got shape {shape}{at} with {dims}; give "
      "None for this leaf"
    )

  def normal(axis):
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axis) or not axis:
      raise ValueError(f"axes out of range: shape {shape}{at} with {dims}")
    return tuple(a % rank for a in axis)

  reduction, output = normal(dims.reduction_axis), normal(dims.output_axis)
  both = reduction + output
  if len(set(both)) != len(both):
    raise ValueError(f"axes overlap: shape {shape}{at} with {dims}")
  batch = tuple(a for a in range(rank) if a not in both)
  return Axes(batch, reduction, output)


def sizes(shape: tuple[int, ...], dims: Dims) -> tuple[int, int]:
  """(fan-in, fan-out)."""
  _, reduction, output = axes(shape, dims)
  return (
    math.prod(shape[a] for a in reduction),
    math.prod(shape[a] for a in output),
  )


def batch_shape(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
  """Sizes of the batch axes, in order."""
  return tuple(shape[a] for a in axes(shape, dims).batch)


def pack(x: jax.Array, dims: Dims) -> jax.Array:
  """x as [S, c, r]."""
  shape, order = x.shape, sum(axes(x.shape, dims), ())
  c, r = sizes(shape, dims)
  if order != tuple(range(x.ndim)):
    x = x.transpose(order)
  # Not -1: a leaf may be empty.
  return x.reshape((math.prod(batch_shape(shape, dims)), c, r))


def unpack(x: jax.Array, shape: tuple[int, ...], dims: Dims) -> jax.Array:
  """The inverse of `pack` for a tensor of the given shape."""
  order = sum(axes(shape, dims), ())
  x = x.reshape(tuple(shape[a] for a in order))
  if order == tuple(range(len(shape))):
    return x
  inverse = sorted(range(len(order)), key=order.__getitem__)
  return x.transpose(inverse)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
  """The sharding in the type of x, if it has axes of an Explicit mesh."""
  sharding = jax.typeof(x).sharding
  if not any(t == AxisType.Explicit for t in sharding.mesh.axis_types):
    return None
  return sharding if any(s is not None for s in sharding.spec) else None


def replicated(x: jax.Array) -> jax.Array:
  """x itself, or its replicated form under an Explicit mesh."""
  sharding = explicit_sharding(x)
  if sharding is None:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


def like(y: jax.Array, x: jax.Array) -> jax.Array:
  """y with the sharding that the type of x has."""
  sharding = explicit_sharding(x)
  return y if sharding is None else jax.sharding.reshard(y, sharding)


def apply(f: Callable[..., jax.Array], dims: Dims, *xs: jax.Array) -> jax.Array:
  """f on the stacks [S, c, r] of equally shaped tensors; one stack comes back.

  Under an Explicit mesh the tensors are replicated for it, because contractions
  over sharded axes have no default there; the result is sharded like the first.
  """
  stacks = [pack(replicated(x), dims) for x in xs]
  return like(unpack(f(*stacks), xs[0].shape, dims), xs[0])
