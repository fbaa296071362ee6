"""A dense layer whose weight gradient is delta gradient descent's (eq. 55-57).

Linear DGD is SGD on L + (decay / 2) sum_t |stop_gradient(k_t) W|^2, so the
gradient of the kernel is x^T (delta + decay y / |x|^2) with y = x W: no
optimizer state and no further matmul. The forward value and the gradient of the
input are those of a plain dense layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REDUCES = ("mean", "sum")
INPUT_NORMS = ("unit", "none")


def _check(reduce: str, input_norm: str) -> None:
  if reduce not in REDUCES:
    raise ValueError(f"reduce must be one of {REDUCES}, got {reduce!r}")
  if input_norm not in INPUT_NORMS:
    raise ValueError(
      f"input_norm must be one of {INPUT_NORMS}, got {input_norm!r}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dense(x, kernel, weight, unit, dot):
  return dot(x, kernel)


def _forward(x, kernel, weight, unit, dot):
  y = dot(x, kernel)
  return y, (x, kernel, y, weight)


def _backward(unit, dot, residuals, g):
  x, kernel, y, weight = residuals
  extra = weight * y.astype(jnp.promote_types(y.dtype, jnp.float32))
  if unit:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    positive = squares > 0
    # Padding: x = 0 must give 0, also to a second derivative.
    extra = jnp.where(positive, extra / jnp.where(positive, squares, 1), 0)
  flat = lambda a: a.reshape((-1, a.shape[-1]))
  total = (g + extra).astype(g.dtype)
  d_kernel = dot(flat(x).mT, flat(total)).astype(kernel.dtype)
  return dot(g, kernel.mT).astype(x.dtype), d_kernel, jnp.zeros_like(weight)


_dense.defvjp(_forward, _backward)


def delta_dense(
  x: jax.Array,
  kernel: jax.Array,
  *,
  decay: jax.typing.ArrayLike = 1.0,
  reduce: str = "mean",
  input_norm: str = "unit",
  num_tokens: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """x @ kernel, with the delta term in the gradient of the kernel.

  Stable for learning rate * decay <= 2 with input_norm="unit" and
  reduce="mean". A bias belongs outside and is not decayed. No forward mode.

  Args:
    x: (..., c).
    kernel: (c, r).
    decay: weight of the term.
    reduce: "mean" over tokens, like a mean training loss, or "sum".
    input_norm: "unit" divides the term by |x|^2, "none" does not.
    num_tokens: tokens to average over, if not those of x: under `shard_map`
      the global number.

  Returns:
    (..., r).

  Raises:
    ValueError: an unknown switch, or num_tokens with reduce="sum".
  """
  _check(reduce, input_norm)
  return _apply(x, kernel, decay, reduce, input_norm, num_tokens, jnp.matmul)


def _apply(x, kernel, decay, reduce, input_norm, num_tokens, dot):
  if num_tokens is not None and reduce == "sum":
    raise ValueError("num_tokens is for reduce='mean', got reduce='sum'")
  tokens = 1 if reduce == "sum" else num_tokens
  if tokens is None:
    tokens = max(math.prod(x.shape[:-1]), 1)
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  weight = jnp.asarray(decay, wide) / tokens
  return _dense(x, kernel, weight, input_norm == "unit", dot)


def delta_dot_general(
  *,
  decay: jax.typing.ArrayLike = 1.0,
  reduce: str = "mean",
  input_norm: str = "unit",
  num_tokens: jax.typing.ArrayLike | None = None,
) -> Callable[..., jax.Array]:
  """`delta_dense` for `nn.Dense(dot_general=...)`; arguments as there.

  Returns:
    A function (x, kernel, dimension_numbers, precision,
    preferred_element_type) that raises ValueError for any contraction but that
    of the last axis of x with the first of a rank-2 kernel.
  """
  _check(reduce, input_norm)

  def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
  ) -> jax.Array:
    (left, right), batch = dimension_numbers
    found = (tuple(left), tuple(right), tuple(map(tuple, batch)), rhs.ndim)
    if found != ((lhs.ndim - 1,), (0,), ((), ()), 2):
      raise ValueError(
        "delta_dot_general contracts the last axis of x with the first of a "
        f"(c, r) kernel, got {dimension_numbers} for shapes {lhs.shape} and "
        f"{rhs.shape}"
      )
    dot = functools.partial(
      jnp.matmul,
      precision=precision,
      preferred_element_type=preferred_element_type,
    )
    return _apply(lhs, rhs, decay, reduce, input_norm, num_tokens, dot)

  return dot_general
