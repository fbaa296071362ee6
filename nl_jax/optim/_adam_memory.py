"""Adam and AdaGrad as optimal element-wise memories (paper App. B).

The memory that maps gradients g_i to a target P best,

    m* = argmin_m sum_i |m g_i - P|^2 + lambda |m|^2 = M P / (H + lambda),

with M = sum g_i and H = sum g_i^2 is Adam for P = sqrt(H) and momentum for
P = H. Deviation: EMAs with bias correction by default; the paper prints sums
weighted by b1 and b2.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels.orthogonalize import stack
from nl_jax.optim import _checks, _dtypes, _spectral

A = jax.typing.ArrayLike
Tree = Any
MAX_EIGH = 1024


class ScaleByAdamMemoryState(NamedTuple):
  """count: int32 scalar; mu: M; nu: H, real; like the parameters."""

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  mu: Tree
  nu: Tree


class ScaleByAdagradMemoryState(NamedTuple):
  """count: int32 scalar; mu: M, or (); sum_sq: H, or [S, n, n] a matrix."""

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  mu: Tree
  sum_sq: Tree


def scale_by_adam_memory(
  b1: A = 0.9,
  b2: A = 0.999,
  eps: A = 1e-8,
  ridge: A | None = None,
  *,
  accumulate: Literal["ema", "sum"] = "ema",
  bias_correction: bool = True,
  target: Literal["rms", "square"] = "rms",
  mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """M P / (H + lambda): the read-out of the element-wise memory.

  The defaults are exactly `optax.scale_by_adam`.

  Args:
    b1, b2: decays of M and H ("ema"), or weights of their sums ("sum").
    eps: lambda = eps sqrt(H), unless `ridge` is given.
    ridge: constant lambda.
    accumulate: "ema", or "sum" as printed.
    bias_correction: correct the bias of averages.
    target: "rms", P = sqrt(H), or "square", P = H.
    mu_dtype: dtype of M; None: the parameters'.

  Returns:
    A transformation with state `ScaleByAdamMemoryState`.
  """
  _checks.one_of("accumulate", accumulate, ("ema", "sum"))
  _checks.one_of("target", target, ("rms", "square"))
  ema = accumulate == "ema"

  def gather(m, x, decay):
    return decay * m + (1 - decay) * x if ema else m + decay * x

  def init(params):
    _checks.inexact(params, "adam_memory")
    return ScaleByAdamMemoryState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(lambda p: _dtypes.moment(p, mu_dtype), params),
      nu=jax.tree.map(lambda p: _dtypes.square(p, None), params),
    )

  def update(updates, state, params=None, **extra):
    del params, extra
    count = optax.safe_increment(state.count)
    g = jax.tree.map(lambda x: x.astype(_dtypes.wide(x)), updates)
    mu = jax.tree.map(lambda m, x: gather(m, x, b1), state.mu, g)
    nu = jax.tree.map(
      lambda n, x: gather(n, _dtypes.abs_square(x), b2), state.nu, g
    )

    def read(m, h):
      if ema and bias_correction:
        m = _dtypes.bias_correct(m, b1, count)
        h = _dtypes.bias_correct(h, b2, count)
      root = _dtypes.safe_sqrt(h)
      # One power of sqrt(H) cancels against lambda = eps sqrt(H).
      goal = 1.0 if target == "rms" else root
      if ridge is None:
        return _dtypes.safe_divide(m * goal, root + eps)
      return _dtypes.safe_divide(m * goal * root, h + ridge)

    direction = _dtypes.cast(jax.tree.map(read, mu, nu), updates)
    mu, nu = _dtypes.cast(mu, state.mu), _dtypes.cast(nu, state.nu)
    return direction, ScaleByAdamMemoryState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def adam_memory(
  learning_rate: optax.ScalarOrSchedule,
  b1: A = 0.9,
  b2: A = 0.999,
  eps: A = 1e-8,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  ridge: A | None = None,
  accumulate: Literal["ema", "sum"] = "ema",
  bias_correction: bool = True,
  target: Literal["rms", "square"] = "rms",
  mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`scale_by_adam_memory` with decoupled weight decay.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: decoupled, times the learning rate.
    mask: what decays, as in `optax.adamw`.
    b1, b2, eps, ridge, accumulate, bias_correction, target, mu_dtype: see
      `scale_by_adam_memory`.
  """
  return optax.chain(
    scale_by_adam_memory(
      b1, b2, eps, ridge, accumulate=accumulate,
      bias_correction=bias_correction, target=target, mu_dtype=mu_dtype,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )  # fmt: skip


def scale_by_adagrad_memory(
  eps: A = 1e-7,
  initial_accumulator_value: A = 0.1,
  *,
  momentum: bool = False,
  granularity: str = "element",
  side: str = "output",
) -> optax.GradientTransformationExtraArgs:
  """g / sqrt(H + eps), H the sum of squares (eq. 108-111).

  The defaults are exactly `optax.scale_by_rss`.

  Args:
    eps: added to H.
    initial_accumulator_value: H at first, times I for a matrix.
    momentum: replaces g by M, the sum of all gradients (printed).
    granularity: "element", or "matrix": H sums g^T g ("output", (r, r)) or
      g g^T ("input", (c, c)) over the last two axes of leaves of rank >= 2,
      and the direction is M H^(-1/2) or H^(-1/2) M.
    side: of "matrix".

  Returns:
    A transformation with state `ScaleByAdagradMemoryState`.

  Raises:
    ValueError: an unknown switch; at init, a side longer than 1024.
  """
  _checks.one_of("granularity", granularity, ("element", "matrix"))
  _checks.one_of("side", side, ("output", "input"))
  by_matrix = lambda x: granularity == "matrix" and x.ndim >= 2

  def square_of(path, p):
    if not by_matrix(p):
      zero = _dtypes.square(p, None)
      return zero + jnp.asarray(initial_accumulator_value, zero.dtype)
    n = p.shape[-1 if side == "output" else -2]
    if n > MAX_EIGH:
      raise ValueError(
        f"granularity='matrix' takes an eigendecomposition of size {n} at "
        f"{jax.tree_util.keystr(path)}, more than {MAX_EIGH}; mask this leaf"
      )
    eye = jnp.eye(n, dtype=_dtypes.wide(p)) * initial_accumulator_value
    return jnp.broadcast_to(eye, (*p.shape[:-2], n, n))

  def init(params):
    real_only = granularity == "matrix"
    _checks.inexact(params, "adagrad_memory", allow_complex=not real_only)
    mu = jax.tree.map(lambda p: _dtypes.slow(p, None), params)
    return ScaleByAdagradMemoryState(
      count=jnp.zeros([], jnp.int32),
      mu=mu if momentum else (),
      sum_sq=jax.tree_util.tree_map_with_path(square_of, params),
    )

  def update(updates, state, params=None, **extra):
    del params, extra

    def squares(h, g):
      if not by_matrix(g):
        return (h + _dtypes.abs_square(g)).astype(h.dtype)
      g = stack.replicated(g).astype(h.dtype)
      return h + (g.mT @ g if side == "output" else g @ g.mT)

    def direct(h, m):
      if not by_matrix(m):
        inverse = jnp.where(
          h > 0, jax.lax.rsqrt(jnp.where(h > 0, h, 1) + eps), 0
        )
        return m * inverse
      eye = jnp.eye(h.shape[-1], dtype=h.dtype).reshape(
        (1,) * (h.ndim - 2) + h.shape[-2:]
      )
      root = _spectral.symmetric_power(h + eps * eye, -0.5)
      x = stack.replicated(m).astype(h.dtype)
      return stack.like(x @ root if side == "output" else root @ x, m)

    sum_sq = jax.tree.map(squares, state.sum_sq, updates)
    mu, source = (), updates
    if momentum:
      mu = source = jax.tree.map(
        lambda m, g: (m + g).astype(m.dtype), state.mu, updates
      )
    direction = _dtypes.cast(jax.tree.map(direct, sum_sq, source), updates)
    count = optax.safe_increment(state.count)
    return direction, ScaleByAdagradMemoryState(count, mu, sum_sq)

  return optax.GradientTransformationExtraArgs(init, update)


def adagrad_memory(
  learning_rate: optax.ScalarOrSchedule,
  eps: A = 1e-7,
  initial_accumulator_value: A = 0.1,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  momentum: bool = False,
  granularity: str = "element",
  side: str = "output",
) -> optax.GradientTransformationExtraArgs:
  """`scale_by_adagrad_memory` with decoupled weight decay.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: decoupled, times the learning rate.
    mask: what decays, as in `optax.adamw`.
    eps, initial_accumulator_value, momentum, granularity, side: see
      `scale_by_adagrad_memory`.
  """
  return optax.chain(
    scale_by_adagrad_memory(
      eps, initial_accumulator_value, momentum=momentum,
      granularity=granularity, side=side,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )  # fmt: skip
