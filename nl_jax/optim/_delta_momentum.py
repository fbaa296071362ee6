"""Delta momentum: the delta rule as a momentum (paper eq. 48-49).

The momentum is a memory that maps gradients to preconditioned gradients. With
K = G or G / |G|_F, P the preconditioner, matrices as (fan-in, fan-out):

    linear    m <- alpha m - eta_d K (K^T m) + eta P(G)
    implicit  m <- (I + eta_d K K^T)^-1 alpha m + eta P(G)
    prox      m <- (I + eta_d K K^T)^-1 (alpha m + eta P(G))
    clip      m <- clip(alpha - eta_d q, 0, 1) m + eta P(G)

q stands for K K^T where that is not a matrix: |K|_F^2 ("tensor"), K * K
("element"). Deviation: the paper prints eta_d = 1 and -eta P(G), with which m
would track the negative gradient, and K = G, which is stable only for small G.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels.orthogonalize import stack
from nl_jax.optim import _checks, _dims, _dtypes

A = jax.typing.ArrayLike
Tree = Any


class ScaleByDeltaMomentumState(NamedTuple):
  """State of `scale_by_delta_momentum`.

  Attributes:
    count: int32 scalar.
    mu: momentum, like the parameters.
    precond: state of the preconditioner, or ().
  """

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  mu: Tree
  precond: optax.OptState


def scale_by_delta_momentum(
  alpha: A = 0.9,
  eta: A = 1.0,
  eta_decay: A = 0.5,
  *,
  decay: Literal["linear", "clip", "implicit", "prox"] = "linear",
  granularity: Literal["matrix", "tensor", "element"] = "matrix",
  side: Literal["input", "output"] = "input",
  key: Literal["frobenius", "raw"] = "frobenius",
  preconditioner: optax.GradientTransformation | None = None,
  eps: A = 1e-8,
  mu_dtype: jax.typing.DTypeLike | None = None,
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum that erases along the gradient before it writes.

  `eta_decay=0` is `optax.trace(alpha)` in every form.

  Args:
    alpha: decay of the momentum.
    eta: rate of the write.
    eta_decay: rate of the erase. With key="frobenius" every value in
      [0, 1 + alpha] is stable; with "raw", "linear" needs
      |G|_2^2 < (1 + alpha) / eta_decay, the other forms nothing.
    decay: "linear", "clip" (not with "matrix"), "implicit" or "prox".
    granularity: "matrix", "tensor" or "element".
    side: "input" erases with K K^T from the left (c x c), "output" with K^T K.
    key: "frobenius" divides by the norm of each matrix, "raw" does not.
    preconditioner: P, its state is kept; None is the identity.
    eps: smallest norm to divide by.
    mu_dtype: dtype of the momentum; None: the parameters'.
    dims: the matrices; a leaf under None is one column.

  Returns:
    A transformation with state `ScaleByDeltaMomentumState`.

  Raises:
    ValueError: an unknown switch, or "clip" with "matrix"; TypeError: complex
      parameters with "implicit" or "prox".
  """
  _checks.one_of("decay", decay, ("linear", "clip", "implicit", "prox"))
  _checks.one_of("granularity", granularity, ("matrix", "tensor", "element"))
  _checks.one_of("side", side, ("input", "output"))
  _checks.one_of("key", key, ("frobenius", "raw"))
  if decay == "clip" and granularity == "matrix":
    raise ValueError(
      "decay='clip' needs granularity='tensor' or 'element', got 'matrix'"
    )
  solves = decay in ("implicit", "prox")
  P = (
    None
    if preconditioner is None
    else (optax.with_extra_args_support(preconditioner))
  )

  def init(params):
    _checks.inexact(params, "delta_momentum", allow_complex=not solves)
    _dims.flat(dims, params)
    return ScaleByDeltaMomentumState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(lambda p: _dtypes.moment(p, mu_dtype), params),
      precond=() if P is None else P.init(params),
    )

  def update(updates, state, params=None, **extra):
    written, precond = updates, ()
    if P is not None:
      written, precond = P.update(updates, state.precond, params, **extra)

    def one(m, g, w, spec):
      m, g, w = (x.astype(_dtypes.wide(x)) for x in (m, g, w))
      if key == "frobenius":
        # At the norm 0 the key is 0, with derivative 0.
        size = _dims.norm(g, spec)
        g = _dtypes.safe_divide(
          g, jnp.where(size > 0, jnp.maximum(size, eps), 0)
        )
      if granularity == "matrix":
        form = _MATRIX_FORMS[decay]
        rule = lambda m, k, w: form(m, k, w, alpha, eta_decay)
        return _on_matrices(rule, side, spec, m, g, eta * w)
      square = _dtypes.abs_square(g)
      if granularity == "tensor":
        square = _dims.norm(g, spec) ** 2
      return _FORMS[decay](m, eta_decay * square, eta * w, alpha)

    treedef = jax.tree.structure(updates)
    columns = (state.mu, updates, written)
    columns = [treedef.flatten_up_to(c) for c in columns]
    mu = [one(*x) for x in zip(*columns, _dims.flat(dims, updates))]
    mu = jax.tree.unflatten(treedef, mu)
    count = optax.safe_increment(state.count)
    new = ScaleByDeltaMomentumState(count, _dtypes.cast(mu, state.mu), precond)
    return _dtypes.cast(mu, updates), new

  return optax.GradientTransformationExtraArgs(init, update)


Rule = Callable[..., jax.Array]

# m, eta_d q, eta P(G), alpha -> m.
_FORMS: dict[str, Rule] = {
  "linear": lambda m, q, w, alpha: alpha * m - q * m + w,
  "clip": lambda m, q, w, alpha: jnp.clip(alpha - q, 0, 1) * m + w,
  "implicit": lambda m, q, w, alpha: alpha * m / (1 + q) + w,
  "prox": lambda m, q, w, alpha: (alpha * m + w) / (1 + q),
}


def _gram_product(k: jax.Array, m: jax.Array) -> jax.Array:
  """K K^H m for stacks [S, c, r], over the smaller side."""
  kh = k.mT.conj()
  small_output = k.shape[-1] < k.shape[-2]
  return k @ (kh @ m) if small_output else (k @ kh) @ m


def _solve(k: jax.Array, y: jax.Array, rate: A) -> jax.Array:
  """(I + rate K K^T)^-1 y for stacks [S, c, r], on the smaller side."""
  kt = k.mT
  c, r = k.shape[-2:]
  eye = jnp.eye(min(c, r), dtype=k.dtype)[None]
  if c <= r:
    return jnp.linalg.solve(eye + rate * (k @ kt), y)
  return y - rate * (k @ jnp.linalg.solve(eye + rate * (kt @ k), kt @ y))


# m, K, eta P(G), alpha, eta_d -> m, for stacks [S, c, r].
_MATRIX_FORMS: dict[str, Rule] = {
  "linear": lambda m, k, w, alpha, rate: (
    alpha * m - rate * _gram_product(k, m) + w
  ),
  "implicit": lambda m, k, w, alpha, rate: _solve(k, alpha * m, rate) + w,
  "prox": lambda m, k, w, alpha, rate: _solve(k, alpha * m + w, rate),
}


def _on_matrices(
  rule: Rule, side: str, spec: _dims.Spec, *xs: jax.Array
) -> jax.Array:
  """A left-side rule on stacks; a leaf without a spec is one column."""
  shape = xs[0].shape
  if spec is None:
    # A leaf of rank < 2 is the matrix (size, 1).
    column = lambda x: stack.replicated(x).reshape((1, -1, 1))
    xs_flat = [column(x) for x in xs]
    if side == "output":
      xs_flat = [x.mT for x in xs_flat]
    return stack.like(rule(*xs_flat).reshape(shape), xs[0])
  if side == "input":
    return stack.apply(rule, spec, *xs)
  return stack.apply(lambda *ys: rule(*(y.mT for y in ys)).mT, spec, *xs)


def delta_momentum(
  learning_rate: optax.ScalarOrSchedule,
  alpha: A = 0.9,
  eta_decay: A = 0.5,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  eta: A = 1.0,
  decay: Literal["linear", "clip", "implicit", "prox"] = "linear",
  granularity: Literal["matrix", "tensor", "element"] = "matrix",
  side: Literal["input", "output"] = "input",
  key: Literal["frobenius", "raw"] = "frobenius",
  preconditioner: optax.GradientTransformation | None = None,
  eps: A = 1e-8,
  mu_dtype: jax.typing.DTypeLike | None = None,
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Delta momentum with decoupled weight decay; see `scale_by_delta_momentum`.

  Args:
    learning_rate: a number or a schedule; it does not enter the recurrence.
    weight_decay: decoupled, times the learning rate.
    mask: what decays, as in `optax.adamw`.
    dims: the matrices; None selects them by `matrix_dims_from_paths`.
    alpha, eta_decay, eta, decay, granularity, side, key, preconditioner, eps,
      mu_dtype: see `scale_by_delta_momentum`.
  """
  return optax.chain(
    scale_by_delta_momentum(
      alpha, eta, eta_decay, decay=decay, granularity=granularity, side=side,
      key=key, preconditioner=preconditioner, eps=eps, mu_dtype=mu_dtype,
      dims=_dims.from_paths(dims),
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )  # fmt: skip


def delta_momentum_paper(
  learning_rate: optax.ScalarOrSchedule, alpha: A = 0.9
) -> optax.GradientTransformationExtraArgs:
  """Eq. 49 with eta = eta_d = 1 and keys as they are: unstable for |G| > 1.

  Args:
    learning_rate: a number or a schedule.
    alpha: decay of the momentum.
  """
  return optax.chain(
    scale_by_delta_momentum(alpha, eta_decay=1.0, key="raw"),
    optax.scale_by_learning_rate(learning_rate),
  )
