"""Nested continuum memory: a slower level's update restarts the faster one.

Paper eq. 72: the initial state of level l is meta-learned at the frequency of
the next slower level. Whenever that level has updated, the faster parameters go
back to their initial state, which may first take a meta-update; the paper gives
no algorithm for it, so the choices below are ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.optim import _checks, _labels

Tree = Any


class ResetOnSlowerState(NamedTuple):
  """State of `reset_on_slower`.

  Attributes:
    start: initial states of all levels but the slowest, like the parameters;
      `optax.MaskedNode` for every other leaf.
    inner: the state of the inner transformation.
  """

  start: Tree
  inner: optax.OptState


def reset_on_slower(
  inner: optax.GradientTransformation,
  periods: Mapping[str, int | None],
  labels: _labels.Labels,
  *,
  order: Sequence[str],
  meta: str = "none",
  meta_rate: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Re-initialises a level whenever the next slower level fires (eq. 72).

  With `end` the parameters of the fast level after its own update u, and
  `start` kept in the state (at first the initial parameters):

      none     start stays
      reptile  start <- start + meta_rate (end - start)
      fomaml   start <- start + meta_rate u, the gradient step at the end point

  and the parameters become `start`. Optimizer states of the level continue. The
  result must be applied as it is: scale and clip inside `inner`.

  Args:
    inner: `multi_frequency(...)`, or a chain that holds exactly one.
    periods: as given to `multi_frequency`; each must divide the next slower.
    labels: as given to `multi_frequency`.
    order: labels of the levels, fastest first.
    meta: "none", "reptile" or "fomaml".
    meta_rate: of the meta-update, 0 to 1.

  Returns:
    A transformation with state `ResetOnSlowerState`; its update needs params.

  Raises:
    ValueError: an unknown switch or label, or periods that do not divide.
  """
  if meta == "full":
    raise ValueError(
      "meta='full' needs in-context CMS, whose updates are differentiated; "
      "pre-training takes meta='none', 'reptile' or 'fomaml'"
    )
  _checks.one_of("meta", meta, ("none", "reptile", "fomaml"))
  slower = _slower(order, periods)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    if not jax.tree.leaves(params):
      return ResetOnSlowerState(params, inner.init(params))
    named = _labels.resolve(labels, params)
    keep = lambda p, name: (
      _copy(p) if not _labels.is_masked(p) and name in slower
      else optax.MaskedNode()
    )  # fmt: skip
    start = jax.tree.map(keep, params, named, is_leaf=_labels.is_masked)
    return ResetOnSlowerState(start, inner.init(params))

  def update(updates, state, params=None, **extra):
    _checks.given(params, "reset_on_slower")
    updates, new_inner = inner.update(updates, state.inner, params, **extra)
    before = optax.tree.get(state.inner, "fired")
    after = optax.tree.get(new_inner, "fired")
    reset = {k: after[s] != before[s] for k, s in slower.items() if s in after}

    def one(start, name, p, u):
      if _labels.is_masked(start) or name not in reset:
        return start, u
      if meta == "reptile":
        moved = start + meta_rate * (p + u - start)
      else:
        moved = start + meta_rate * u if meta == "fomaml" else start
      moved = jnp.where(reset[name], moved.astype(start.dtype), start)
      # Exact only up to rounding: the caller adds this to the parameters.
      return moved, jnp.where(reset[name], (moved - p).astype(u.dtype), u)

    named = _labels.resolve(labels, params)
    pairs = jax.tree.map(
      one, state.start, named, params, updates, is_leaf=_labels.is_masked
    )
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2
    start = jax.tree.map(lambda x: x[0], pairs, is_leaf=is_pair)
    updates = jax.tree.map(lambda x: x[1], pairs, is_leaf=is_pair)
    return updates, ResetOnSlowerState(start, new_inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _slower(order: Sequence[str], periods: Mapping) -> dict[str, str]:
  """The next slower level, by label."""
  missing = [label for label in order if label not in periods]
  if missing:
    raise ValueError(f"order names {missing}, which have no period")
  for fast, slow in zip(order[:-1], order[1:]):
    if periods[fast] is None or periods[slow] is None:
      continue
    if max(periods[slow], 1) % max(periods[fast], 1):
      raise ValueError(
        f"the period of {slow!r} must be a multiple of that of {fast!r}, got "
        f"{periods[slow]} and {periods[fast]}; order is fastest first"
      )
  return dict(zip(order[:-1], order[1:]))


def _copy(p: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
  # A copy, not an alias: parameters and state are donated separately.
  if isinstance(p, jax.ShapeDtypeStruct):
    return jnp.zeros_like(p)
  return jnp.copy(p)
