"""The mesh, the logical axes, and the one table that maps them."""

import jax


def mesh(
  replica: int = 1, fsdp: int = -1, sequence: int = 1, tensor: int = 1
) -> jax.sharding.Mesh:
  """The device mesh ("replica", "fsdp", "sequence", "tensor"); one may be -1."""
  raise NotImplementedError
