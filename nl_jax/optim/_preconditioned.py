"""Preconditioned momentum and feature momentum (paper eq. 46-47, 51).

    m <- alpha m + eta P(g)                    preconditioned
    m <- alpha m + eta P(phi(g / s)) s         features, s = RMS(g) or 1

P is any optax transformation, phi keeps the shape: the paper allows lifted
features too but gives no read-out for them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels import orthogonalize
from nl_jax.kernels.orthogonalize import stack
from nl_jax.optim import _checks, _dims, _dtypes, _spectral

A = jax.typing.ArrayLike
Tree = Any
MAX_EIGH = 1024


class ScaleByPreconditionedMomentumState(NamedTuple):
  """State of `scale_by_preconditioned_momentum`.

  Attributes:
    count: int32 scalar.
    mu: momentum, like the parameters.
    precond: state of the preconditioner.
  """

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  mu: Tree
  precond: optax.OptState


class ScaleByFeatureMomentumState(NamedTuple):
  """State of `scale_by_feature_momentum`; fields as above."""

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  mu: Tree
  precond: optax.OptState


def _momentum(m, written, alpha, eta):
  return jax.tree.map(
    lambda m, w: alpha * m + eta * w.astype(_dtypes.wide(w)), m, written
  )


def scale_by_preconditioned_momentum(
  preconditioner: optax.GradientTransformation,
  alpha: A = 0.9,
  eta: A = 1.0,
  *,
  nesterov: bool = False,
  mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """m <- alpha m + eta P(g) (eq. 46-47).

  Args:
    preconditioner: P: `diag_preconditioner()`, `left_gram_preconditioner()`,
      `orthogonal_preconditioner()` or any optax transformation.
    alpha: decay of the momentum.
    eta: rate of the write.
    nesterov: the direction is alpha m + eta P(g) with the new m.
    mu_dtype: dtype of the momentum; None: the parameters'.

  Returns:
    A transformation with state `ScaleByPreconditionedMomentumState`.
  """
  P = optax.with_extra_args_support(preconditioner)

  def init(params):
    _checks.inexact(params, "preconditioned momentum")
    mu = jax.tree.map(lambda p: _dtypes.moment(p, mu_dtype), params)
    return ScaleByPreconditionedMomentumState(
      jnp.zeros([], jnp.int32), mu, P.init(params)
    )

  def update(updates, state, params=None, **extra):
    written, precond = P.update(updates, state.precond, params, **extra)
    mu = _momentum(state.mu, written, alpha, eta)
    direction = _momentum(mu, written, alpha, eta) if nesterov else mu
    new = ScaleByPreconditionedMomentumState(
      optax.safe_increment(state.count), _dtypes.cast(mu, state.mu), precond
    )
    return _dtypes.cast(direction, updates), new

  return optax.GradientTransformationExtraArgs(init, update)


FEATURES = {
  "tanh": jnp.tanh,
  "sign": jnp.sign,
  "signed_sqrt": lambda x: jnp.sign(x) * _dtypes.safe_sqrt(jnp.abs(x)),
  "identity": lambda x: x,
}


def scale_by_feature_momentum(
  feature: str | Callable[[jax.Array], jax.Array] = "tanh",
  alpha: A = 0.9,
  eta: A = 1.0,
  *,
  preconditioner: optax.GradientTransformation | None = None,
  normalize: str | None = "rms",
  mu_dtype: jax.typing.DTypeLike | None = None,
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum of features of the gradient (eq. 51).

  Args:
    feature: "tanh", "sign", "signed_sqrt", "identity", "orthogonalize", or a
      function of one leaf that keeps its shape.
    alpha: decay of the momentum.
    eta: rate of the write.
    preconditioner: P, on the features; None is the identity.
    normalize: "rms" divides each tensor by its RMS first and multiplies it
      back, so that the rule is scale-equivariant; None does not.
    mu_dtype: dtype of the momentum; None: the parameters'.
    dims: the matrices of "orthogonalize"; other leaves keep their gradient.

  Returns:
    A transformation with state `ScaleByFeatureMomentumState`.

  Raises:
    ValueError: an unknown switch; at the first update, a feature map that
      changes the shape.
  """
  _checks.one_of("normalize", normalize, ("rms", None))
  if not callable(feature):
    _checks.one_of("feature", feature, (*FEATURES, "orthogonalize"))
  P = optax.with_extra_args_support(
    optax.identity() if preconditioner is None else preconditioner
  )

  def phi(path, x):
    y = (feature if callable(feature) else FEATURES[feature])(x)
    if y.shape != x.shape:
      raise ValueError(
        "a feature map must keep the shape, got "
        f"{y.shape} from {x.shape} at {jax.tree_util.keystr(path)}"
      )
    return y

  def init(params):
    _checks.inexact(params, "feature momentum")
    _dims.flat(dims, params)
    mu = jax.tree.map(lambda p: _dtypes.moment(p, mu_dtype), params)
    return ScaleByFeatureMomentumState(
      jnp.zeros([], jnp.int32), mu, P.init(params)
    )

  def update(updates, state, params=None, **extra):
    g = jax.tree.map(lambda x: x.astype(_dtypes.wide(x)), updates)
    scale = jax.tree.map(_rms if normalize else lambda x: jnp.ones_like(x), g)
    g = jax.tree.map(_dtypes.safe_divide, g, scale)
    if feature == "orthogonalize":
      g = orthogonalize.orthogonalize_tree(g, _dims.as_tree(dims, g))
    else:
      g = jax.tree_util.tree_map_with_path(phi, g)
    g, precond = P.update(g, state.precond, params, **extra)
    mu = _momentum(state.mu, jax.tree.map(jnp.multiply, g, scale), alpha, eta)
    new = ScaleByFeatureMomentumState(
      optax.safe_increment(state.count), _dtypes.cast(mu, state.mu), precond
    )
    return _dtypes.cast(mu, updates), new

  return optax.GradientTransformationExtraArgs(init, update)


def _rms(x):
  mean = jnp.mean(_dtypes.abs_square(x), keepdims=True) if x.size else 1.0
  return jnp.broadcast_to(_dtypes.safe_sqrt(mean), x.shape)


class DiagPreconditionerState(NamedTuple):
  """count: int32 scalar; nu: second moment, real, like the parameters."""

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  nu: Tree


def diag_preconditioner(
  b2: A = 0.999, eps: A = 1e-8
) -> optax.GradientTransformationExtraArgs:
  """g / (sqrt(v) + eps), v the bias-corrected EMA of g^2; momentum after it
  is LaProp.

  Args:
    b2: decay of the second moment.
    eps: in the denominator.
  """

  def init(params):
    nu = jax.tree.map(lambda p: _dtypes.square(p, None), params)
    return DiagPreconditionerState(jnp.zeros([], jnp.int32), nu)

  def update(updates, state, params=None, **extra):
    del params, extra
    count = optax.safe_increment(state.count)
    nu = jax.tree.map(
      lambda n, g: (b2 * n + (1 - b2) * _dtypes.abs_square(g)).astype(n.dtype),
      state.nu, updates,
    )  # fmt: skip
    root = lambda n: _dtypes.safe_sqrt(_dtypes.bias_correct(n, b2, count))
    out = jax.tree.map(lambda g, n: g / (root(n) + eps), updates, nu)
    return _dtypes.cast(out, updates), DiagPreconditionerState(count, nu)

  return optax.GradientTransformationExtraArgs(init, update)


class LeftGramPreconditionerState(NamedTuple):
  """count: int32 scalar; gram: [S, n, n] a matrix leaf, () for the others."""

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  gram: Tree


def left_gram_preconditioner(
  b2: A = 0.999,
  eps: A = 1e-8,
  power: float = -0.5,
  side: str = "input",
  *,
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """(EMA(G G^T) + eps I)^power G, one-sided Shampoo; vectors pass unchanged.

  Args:
    b2: decay of the Gram matrix, bias-corrected.
    eps: added to its diagonal.
    power: of the Gram matrix.
    side: "input" is G G^T (c, c), "output" G^T G (r, r) from the right.
    dims: the matrices.

  Raises:
    ValueError: an unknown side; at init, a side longer than 1024.
  """
  _checks.one_of("side", side, ("input", "output"))

  def gram_shape(shape, spec, path):
    n = stack.sizes(shape, spec)[0 if side == "input" else 1]
    if n > MAX_EIGH:
      raise ValueError(
        f"left_gram_preconditioner takes an eigendecomposition of size {n} at "
        f"{jax.tree_util.keystr(path)}, more than {MAX_EIGH}; mask this leaf"
      )
    count = 1
    for size in stack.batch_shape(shape, spec):
      count *= size
    return (count, n, n)

  def init(params):
    _checks.inexact(params, "left_gram_preconditioner", allow_complex=False)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    gram = [
      () if spec is None
      else jnp.zeros(gram_shape(p.shape, spec, path), _dtypes.wide(p))
      for (path, p), spec in zip(paths, _dims.flat(dims, params))
    ]  # fmt: skip
    return LeftGramPreconditionerState(
      jnp.zeros([], jnp.int32), jax.tree.unflatten(treedef, gram)
    )

  def update(updates, state, params=None, **extra):
    del params, extra
    count = optax.safe_increment(state.count)

    def one(g, gram, spec):
      if spec is None:
        return g, ()
      G = stack.pack(stack.replicated(g), spec).astype(gram.dtype)
      G = G if side == "input" else G.mT
      gram = b2 * gram + (1 - b2) * G @ G.mT
      eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
      fixed = _dtypes.bias_correct(gram, b2, count) + eps * eye
      y = _spectral.symmetric_power(fixed, power) @ G
      y = stack.unpack(y if side == "input" else y.mT, g.shape, spec)
      return stack.like(y.astype(g.dtype), g), gram

    leaves, treedef = jax.tree.flatten(updates)
    grams = treedef.flatten_up_to(state.gram)
    pairs = list(map(one, leaves, grams, _dims.flat(dims, updates)))
    out, gram = (jax.tree.unflatten(treedef, list(x)) for x in zip(*pairs))
    return out, LeftGramPreconditionerState(count, gram)

  return optax.GradientTransformationExtraArgs(init, update)


def orthogonal_preconditioner(
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformation:
  """P = Newton-Schulz on matrices; other leaves pass unchanged.

  Args:
    dims: the matrices; None is (-2, -1) for rank >= 2.
  """

  def update(updates, state, params=None):
    del params
    specs = _dims.as_tree(dims, updates)
    return orthogonalize.orthogonalize_tree(updates, specs), state

  return optax.GradientTransformation(optax.init_empty_state, update)
