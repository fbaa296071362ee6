"""The inverse of a unit lower triangular matrix, by blocks (kernels.md 1.5)."""

import jax
import jax.numpy as jnp

# Float32 must mean float32: the erase system is ill conditioned when keys
# repeat, and one bfloat16 pass (a TPU's default) loses it.
PRECISION = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def unit_lower_inverse(L: jax.Array) -> jax.Array:
  """(I + L)^{-1} for strictly lower L [..., C, C], by matmuls alone.

  Doubles the size of the inverted diagonal blocks at each of log2(C) rounds,
  so it is backward stable; a product of (I + L^(2^k)) is not.
  """
  C = L.shape[-1]
  size = 1 << max(C - 1, 0).bit_length()
  if size != C:
    L = jnp.pad(L, [(0, 0)] * (L.ndim - 2) + [(0, size - C)] * 2)
  rows = jnp.arange(size)[:, None]
  columns = jnp.arange(size)[None, :]

  def off_diagonal(b: int) -> jax.Array:
    pair = rows // (2 * b) == columns // (2 * b)
    block = pair & (rows // b % 2 == 1) & (columns // b % 2 == 0)
    return jnp.where(block.reshape((1,) * (L.ndim - 2) + block.shape), L, 0.0)

  X = jnp.broadcast_to(
    jnp.eye(size, dtype=L.dtype).reshape((1,) * (L.ndim - 2) + (size, size)),
    L.shape,
  )
  if size > 1:
    X = X - off_diagonal(1)
  b = 2
  while b < size:
    right = jnp.matmul(off_diagonal(b), X, precision=PRECISION)
    X = X - jnp.matmul(X, right, precision=PRECISION)
    b *= 2
  return X[..., :C, :C]


@unit_lower_inverse.defjvp
def _jvp(primals, tangents):
  X = unit_lower_inverse(*primals)
  right = jnp.matmul(tangents[0], X, precision=PRECISION)
  return X, -jnp.matmul(X, right, precision=PRECISION)
