"""Where a program will run: the platform, and the devices of each axis."""

import math

import jax
from jax.sharding import PartitionSpec as P


def platform() -> str:
  """That of the mesh, whose chips may not be here, or of this process."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def parts(mesh: jax.sharding.AbstractMesh, spec: P) -> list[int]:
  """The number of devices over which each of four array axes is split."""
  axes = [() if a is None else (a,) if isinstance(a, str) else a for a in spec]
  axes += [()] * (4 - len(axes))
  return [math.prod(mesh.shape.get(name, 1) for name in a) for a in axes]


def undivided(
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
  counts: list[int],
) -> str | None:
  """Why rows and heads do not divide over devices, or None where they do.

  Args:
    q: [B,T,H,K]; k: [B,T,G,K].
    counts: of `parts`.
  """
  for name, size, count in (
    ("rows", q.shape[0], counts[0]),
    ("heads", q.shape[2], counts[2]),
    ("heads of keys", k.shape[2], counts[2]),
  ):
    if size % count:
      return f"{size} {name} do not divide over {count} devices of the mesh"
  return None
