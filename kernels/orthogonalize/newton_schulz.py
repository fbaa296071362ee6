"""The Newton-Schulz loop on a stack of matrices [S, m, n], m <= n."""

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.kernels.orthogonalize import coefficients

LARGE = 2**14  # Entries of a matrix.


def norm(x: jax.Array, axis_name: str | None = None) -> jax.Array:
  """Frobenius norms [S, 1, 1], at least float32, of derivative 0 at 0."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  squares = jnp.sum(jnp.real(wide * wide.conj()), (-2, -1), keepdims=True)
  if axis_name is not None:
    squares = jax.lax.psum(squares, axis_name)
  positive = squares > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def normalize(
  x: jax.Array,
  factor: float,
  eps: jax.typing.ArrayLike,
  axis_name: str | None = None,
) -> jax.Array:
  """x / (factor |x| + eps); 0 stays 0, with derivative 0 and not 1 / eps."""
  size = norm(x, axis_name)
  positive = size > 0
  scale = 1.0 / jnp.where(positive, factor * size + eps, 1.0)
  scale = jnp.where(positive, scale, 0.0)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(wide) * scale).astype(x.dtype)


def orthogonalize_stack(
  x: jax.Array,
  *,
  coeffs: str | coefficients.Table,
  ns_steps: coefficients.Steps,
  eps: jax.typing.ArrayLike,
  zeta: jax.typing.ArrayLike,
  axis_name: str | None = None,
) -> jax.Array:
  """Orthogonalises each matrix of [S, m, n]; cheapest with m <= n.

  With `axis_name` n is split over a mesh axis (inside `shard_map`), and the
  m x m Gram matrix is summed over it in every step.
  """
  if coefficients.is_static(ns_steps) and not ns_steps:
    return x

  def loop(x):
    return _loop(x, coeffs, ns_steps, eps, zeta, axis_name)

  S, m, n = x.shape
  if S == 1 or m * n < LARGE or axis_name is not None:
    return loop(x)
  # A CPU is fastest one matrix at a time, in its cache (1.3-1.9 times).
  one_by_one = lambda x: jax.lax.map(lambda y: loop(y[None])[0], x)
  return jax.lax.platform_dependent(x, cpu=one_by_one, default=loop)


def _loop(x, coeffs, ns_steps, eps, zeta, axis_name):
  name = coeffs if isinstance(coeffs, str) else ""
  factor = coefficients.NORM_FACTORS.get(name, 1.0)
  x = normalize(x, factor, eps, axis_name)

  def gram(x):
    a = jnp.matmul(x, x.mT.conj())
    return a if axis_name is None else jax.lax.psum(a, axis_name)

  # One rolled loop for the whole stack: unrolling it costs 2-3 times the time
  # and more than 3 times the temporary memory.
  if name == coefficients.EQ44:
    goal, zeta = x, jnp.asarray(zeta).astype(jnp.real(x).dtype)

    def step(x, _):
      pull = 2 * (jnp.matmul(gram(x), x) - x)
      return x - zeta * (x - goal + pull), None

    rows = np.zeros((1, 3))
  else:

    def step(x, abc):
      a, b, c = abc
      A = gram(x)
      return a * x + jnp.matmul(b * A + c * jnp.matmul(A, A), x), None

    rows = coefficients.rows(coeffs)
  if coefficients.is_static(ns_steps):
    rows = coefficients.repeated(rows, ns_steps)
    return jax.lax.scan(step, x, jnp.asarray(rows, jnp.real(x).dtype))[0]
  # A loop of unknown length: it has no derivative backwards.
  rows = jnp.asarray(rows, jnp.real(x).dtype)
  last = rows.shape[0] - 1
  body = lambda i, x: step(x, rows[jnp.minimum(i, last)])[0]
  return jax.lax.fori_loop(0, ns_steps, body, x)
