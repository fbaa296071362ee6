"""Inner objectives of a memory: loss and error (docs/mathematics.md 2.2).

An objective maps (prediction M(k), target v), both [..., V], to terms [..., V]
that add up to the loss and the error d loss / d M(k) [..., V]. The error is
what a memory learns from; it is written out, since the outer loss
differentiates through it. The loss is a metric: its terms are added up late,
over tokens first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

HUBER_WIDTH = 1.0
LP_POWER = 3.0
# Smoothing of sign and absolute value: with the exact sign the outer gradient
# dies (Miras).
LP_SLOPE = 10.0


class Objective(NamedTuple):
  """An inner objective.

  Attributes:
    terms: (prediction, target) -> what adds up to the loss, [..., V].
    error: (prediction, target) -> d loss / d prediction, [..., V].
  """

  terms: Callable[[jax.Array, jax.Array], jax.Array]
  error: Callable[[jax.Array, jax.Array], jax.Array]


def _dot_terms(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return -prediction * target


def _dot_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return -jnp.broadcast_to(target, prediction.shape)


def _l2_terms(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return 0.5 * jnp.square(prediction - target)


def _l2_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return prediction - target


def _huber(r: jax.Array) -> jax.Array:
  inside = 0.5 * jnp.square(r)
  outside = HUBER_WIDTH * (jnp.abs(r) - 0.5 * HUBER_WIDTH)
  return jnp.where(jnp.abs(r) <= HUBER_WIDTH, inside, outside)


def _huber_terms(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return _huber(prediction - target)


def _huber_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.clip(prediction - target, -HUBER_WIDTH, HUBER_WIDTH)


def _size(r: jax.Array) -> jax.Array:
  # The added constant keeps derivatives of the norm finite at r = 0.
  return jnp.sum(jnp.square(r), axis=-1, keepdims=True) + 1e-12


def _huber_norm_terms(prediction: jax.Array, target: jax.Array) -> jax.Array:
  whole = _huber(jnp.sqrt(_size(prediction - target)))
  return jnp.broadcast_to(whole / target.shape[-1], target.shape)


def clip_norm(error: jax.Array, limit: float) -> jax.Array:
  """Scales error [..., V] to a norm of at most `limit`."""
  return error * jnp.minimum(1.0, limit * jax.lax.rsqrt(_size(error)))


def _huber_norm_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return clip_norm(prediction - target, HUBER_WIDTH)


def _lp_terms(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.abs(prediction - target) ** LP_POWER


def _lp_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  r = prediction - target
  size = (jnp.square(r) + 1e-6) ** ((LP_POWER - 1.0) / 2.0)
  return LP_POWER * jnp.tanh(LP_SLOPE * r) * size


OBJECTIVES = {
  "dot": Objective(_dot_terms, _dot_error),
  "l2": Objective(_l2_terms, _l2_error),
  "huber": Objective(_huber_terms, _huber_error),
  "huber_norm": Objective(_huber_norm_terms, _huber_norm_error),
  "lp": Objective(_lp_terms, _lp_error),
}
dot, l2, huber, huber_norm, lp = OBJECTIVES.values()
