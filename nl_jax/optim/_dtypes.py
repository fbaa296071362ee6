"""Dtypes of optimizer states (docs/mathematics.md 10.9); roots safe at zero."""

import dataclasses

import jax
import jax.numpy as jnp

DType = jax.typing.DTypeLike | None


@dataclasses.dataclass(frozen=True)
class StateDtypes:
  """Dtypes of the state of `scale_by_m3`.

  Attributes:
    m1: dtype of m1; None: the parameters'.
    nu: dtype of nu; None is at least float32.
    slow: dtype of m2 and slow_sum; None is at least float32.
    o2: dtype of o2; None: that of m1.
  """

  m1: DType = None
  nu: DType = None
  slow: DType = None
  o2: DType = None


def wide(x: jax.Array) -> jnp.dtype:
  """The dtype to compute in: at least float32, complex stays complex."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _as_complex(x: jax.Array, dtype: jax.typing.DTypeLike) -> jnp.dtype:
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jnp.promote_types(jnp.dtype(dtype), jnp.complex64)
  return jnp.dtype(dtype)


def moment(x: jax.Array, dtype: DType) -> jax.Array:
  """Zeros for a first moment: the parameter's dtype unless one is given."""
  return jnp.zeros_like(x, dtype=_as_complex(x, dtype) if dtype else x.dtype)


def slow(x: jax.Array, dtype: DType) -> jax.Array:
  """Zeros for a long sum: at least float32 unless a dtype is given."""
  return jnp.zeros_like(x, dtype=_as_complex(x, dtype) if dtype else wide(x))


def square(x: jax.Array, dtype: DType) -> jax.Array:
  """Zeros for a second moment: real, at least float32 unless given."""
  real = jnp.finfo(wide(x)).dtype
  return jnp.zeros_like(x, dtype=dtype if dtype else real)


def cast(tree, like):
  """`tree` leaf by leaf in the dtypes of `like`."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Square root with derivative 0 at 0."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
  """x / y, and 0 with derivative 0 where y is 0."""
  nonzero = y != 0
  return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), 0)


def abs_square(x: jax.Array) -> jax.Array:
  """Squared modulus, real."""
  return jnp.real(x * x.conj()) if jnp.iscomplexobj(x) else x * x


def bias_correct(
  x: jax.Array, decay: jax.typing.ArrayLike, count: jax.Array
) -> jax.Array:
  """x / (1 - decay^count) in the dtype of x."""
  correction = 1 - decay**count
  return x / jnp.asarray(correction).astype(jnp.real(x).dtype)
