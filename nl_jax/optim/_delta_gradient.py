"""Delta gradient descent as an optimizer: the Gram form (paper eq. 55-57).

    g <- g + decay (mean_t k_t k_t^T) W

with k_t the inputs of the layer. `delta_dense` puts the same term into the
weight gradient at no cost; this form is for gradients that come from elsewhere.
Deviation: eq. 57's rate eta / (1 + eta) is exact only for unit inputs, and the
paper's Appendix C has wrong signs; neither is used.
"""

from typing import Any

import jax
import optax

from nl_jax.optim import _checks, _dtypes

A = jax.typing.ArrayLike
Tree = Any


def scale_by_delta_gradient(
  decay: A = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """g + decay (G @ W), G the Gram matrix of the layer's inputs.

  `update(g, state, params, input_gram=tree)`: a tree like the parameters with a
  matrix (..., c, c) for a kernel (..., c, r), None where there is none.

  Args:
    decay: weight of the term.

  Raises:
    ValueError: at the update, no params, no `input_gram`, or a wrong shape.
  """

  def init(params):
    _checks.inexact(params, "delta_gradient")
    return optax.EmptyState()

  def update(updates, state, params=None, *, input_gram=None, **extra):
    del extra
    _checks.given(params, "delta_gradient")
    if input_gram is None:
      raise ValueError(
        "delta_gradient needs update(..., input_gram=tree): a (c, c) matrix "
        "for every kernel (c, r), None for other leaves"
      )

    def one(path, g, w, gram):
      if gram is None:
        return g
      square = (*w.shape[:-2], w.shape[-2], w.shape[-2]) if w.ndim > 1 else None
      if gram.shape != square:
        raise ValueError(
          f"input_gram must be {square} for the kernel {w.shape} at "
          f"{jax.tree_util.keystr(path)}, got {gram.shape}"
        )
      w = w.astype(_dtypes.wide(w))
      return (g + decay * (gram @ w)).astype(g.dtype)

    new = jax.tree_util.tree_map_with_path(one, updates, params, input_gram)
    return new, state

  return optax.GradientTransformationExtraArgs(init, update)


def delta_gradient(
  learning_rate: optax.ScalarOrSchedule,
  decay: A = 1.0,
  momentum: A | None = None,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Delta gradient descent; stable for learning_rate * decay * |G|_2 <= 2.

  On an L2 loss its fixed point is half the solution: it is the delta rule of
  the dot-product loss alone.

  Args:
    learning_rate: a number or a schedule.
    decay: weight of the Gram term.
    momentum: of `optax.trace`, or None.
    weight_decay: decoupled, times the learning rate.
    mask: what decays, as in `optax.adamw`.
  """
  return optax.chain(
    scale_by_delta_gradient(decay),
    optax.identity() if momentum is None else optax.trace(momentum),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
