"""Powers of positive semi-definite matrices, differentiable at equal roots."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def symmetric_power(x: jax.Array, power: float) -> jax.Array:
  """x^power of symmetric positive matrices [..., n, n], by eigh."""
  values, Q = jnp.linalg.eigh(x)
  return (Q * _power(values, power)[..., None, :]) @ Q.mT


@symmetric_power.defjvp
def _jvp(primals, tangents):
  # Daleckii-Krein. The derivative of eigh itself divides by differences of
  # eigenvalues, all 0 for the multiple of the identity that states start at.
  x, power = primals
  values, Q = jnp.linalg.eigh(x)
  f = _power(values, power)
  gap = values[..., :, None] - values[..., None, :]
  mean = (values[..., :, None] + values[..., None, :]) / 2
  near = jnp.abs(gap) <= 1e-3 * jnp.abs(mean)
  quotient = (f[..., :, None] - f[..., None, :]) / jnp.where(near, 1, gap)
  slope = jnp.where(near, power * _power(mean, power - 1), quotient)
  y = (Q * f[..., None, :]) @ Q.mT
  return y, Q @ (slope * (Q.mT @ tangents[0] @ Q)) @ Q.mT


def _power(values, power):
  positive = values > 0
  return jnp.where(positive, jnp.where(positive, values, 1) ** power, 0)
