"""The runner of levels: weights that learn at their own periods (Def. 2-4).

A unit is one call of the loss; level l updates every `period` units by the
gradients gathered since its last update (eq. 71):

    theta_l <- theta_l + rule(Red(sum of grad_theta_l loss over its period))

`nested_scan` runs one `lax.scan` a level, the fastest inside; `nested_step`
runs one unit from any clocks. Both give the same numbers, for one sequence:
callers `vmap`. The gradient of an outer loss flows through every update.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any
# (params by level, carry, x) -> (loss, (carry, weight, output)); the loss is
# the weighted sum over the unit. A negative weight says that the unit is not
# there for this sequence: nothing is gathered and no clock advances.
LossFn = Callable[
  [dict[str, Tree], Tree, Tree],
  tuple[jax.Array, tuple[Tree, jax.Array, Tree]],
]
OnSlowerUpdate = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
_REDUCES = ("mean", "sum")


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
  """One level: what its weights learn by, and how often.

  Attributes:
    name: its key in the parameters.
    period: units between two updates; None: it never updates.
    rule: any optax transform; sees the reduced gradient of a period.
    reduce: "mean" over the gathered weight, or "sum" (eq. 71).
    on_slower_update: (start, params, gradient) -> (start, params), called when
      the next slower level has updated (nested CMS, eq. 72); `gradient` is the
      reduced one of the level's own last period. Its rule begins anew.
  """

  name: str
  period: int | None
  rule: optax.GradientTransformation
  reduce: str = "mean"
  on_slower_update: OnSlowerUpdate | None = None

  def __post_init__(self):
    if self.period is not None and (
      type(self.period) is not int or self.period < 1
    ):
      raise ValueError(
        f"the period of level {self.name!r} must be None or an integer >= 1, "
        f"got {self.period!r}"
      )
    if self.reduce not in _REDUCES:
      raise ValueError(
        f"the reduce of level {self.name!r} must be one of "
        f"{', '.join(_REDUCES)}; got {self.reduce!r}"
      )


class LevelState(NamedTuple):
  """What a level carries from unit to unit.

  Attributes:
    params: its weights now.
    start: what they restart from (eq. 72); () without `on_slower_update`.
    gradient: reduced, of its last period; () without `on_slower_update`.
    rule: the state of the rule.
    gathered: sum of gradients since the last update, like params; () for a
      level that never updates.
    weight: scalar, sum of weights since then.
    clock: int32 scalar, units since then.
  """

  params: Tree
  start: Tree
  gradient: Tree
  rule: Tree
  gathered: Tree
  weight: jax.Array
  clock: jax.Array


State = dict[str, LevelState]


def nested_init(levels: Sequence[Level], params: Mapping[str, Tree]) -> State:
  """The state at the start of a sequence.

  Args:
    levels: fastest first.
    params: initial weights by level name.

  Raises:
    ValueError: periods that do not divide each other, names that differ.
  """
  check(levels, params)
  state = {}
  for level in levels:
    weights = params[level.name]
    learns = level.period is not None
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state[level.name] = LevelState(
      params=weights,
      start=weights if level.on_slower_update else (),
      gradient=zeros if level.on_slower_update else (),
      rule=level.rule.init(weights) if learns else (),
      gathered=zeros if learns else (),
      weight=jnp.zeros((), _wide(weights)),
      clock=jnp.zeros((), jnp.int32),
    )
  return state


def nested_scan(
  loss_fn: LossFn,
  levels: Sequence[Level],
  state: State,
  carry: Tree,
  xs: Tree,
  *,
  fresh: bool = False,
  first_order: bool = False,
) -> tuple[State, Tree, Tree]:
  """Runs units one after the other.

  Temporaries of the backward pass grow with the sum of the scans' lengths and
  not with their product: each scan is rematerialised, its carry excepted.

  Args:
    loss_fn: see `LossFn`.
    levels: fastest first.
    state: of `nested_init` or of an earlier call.
    carry: what the loss carries from unit to unit.
    xs: inputs of the units, leaves [N,...].
    fresh: the promise that all clocks are at 0 (static): one scan a level.
      Without, one scan of `nested_step`.
    first_order: the outer gradient stops at the inner gradients.

  Returns:
    The state, the carry, and the outputs, leaves [N,...].
  """
  check(levels, state)

  def unit(held, x):
    state, carry = held
    state, carry, output = _gather(
      loss_fn, levels, state, carry, x, first_order
    )
    return (state, carry), output

  if not fresh:

    def step(held, x):
      (state, carry), output = unit(held, x)
      return (_update_due(levels, state), carry), output

    held, outputs = _scan(step, (state, carry), xs)
  else:
    learning = [level for level in levels if level.period is not None]
    held, outputs = _nested(unit, learning, (state, carry), xs)
  return *held, outputs


def nested_step(
  loss_fn: LossFn,
  levels: Sequence[Level],
  state: State,
  carry: Tree,
  x: Tree,
  *,
  first_order: bool = False,
) -> tuple[State, Tree, Tree]:
  """One unit, from any clocks; arguments and results as in `nested_scan`."""
  state, carry, output = _gather(loss_fn, levels, state, carry, x, first_order)
  return _update_due(levels, state), carry, output


def check(levels: Sequence[Level], params: Mapping[str, Tree]) -> None:
  """Raises ValueError unless periods divide each other and names agree."""
  names = [level.name for level in levels]
  if sorted(names) != sorted(params):
    raise ValueError(
      f"levels and parameters must have the same names, got {names} and "
      f"{list(params)}"
    )
  periods = [x.period for x in levels if x.period is not None]
  for fast, slow in zip(periods, periods[1:]):
    if slow % fast:
      raise ValueError(
        "the periods of levels go from fast to slow, each a multiple of the "
        f"one before, got {periods}"
      )


def _gather(
  loss_fn: LossFn,
  levels: Sequence[Level],
  state: State,
  carry: Tree,
  x: Tree,
  first_order: bool,
) -> tuple[State, Tree, Tree]:
  """One unit without updates: its gradient is added to what is gathered."""
  frozen = {v.name: state[v.name].params for v in levels if v.period is None}
  learned = {k: at.params for k, at in state.items() if k not in frozen}

  def loss(learned):
    return loss_fn({**frozen, **learned}, carry, x)

  grads, (carry, weight, output) = jax.grad(loss, has_aux=True)(learned)
  if first_order:
    grads = jax.lax.stop_gradient(grads)
  # A unit of padding adds exactly 0, whatever its gradient.
  real = weight > 0
  there = (weight >= 0).astype(jnp.int32)
  weight = jnp.maximum(weight, 0)
  new = {}
  for level in levels:
    at = state[level.name]
    at = at._replace(clock=at.clock + there)
    if level.period is not None:
      add = lambda sum_, g: sum_ + jnp.where(real, g, 0).astype(sum_.dtype)
      at = at._replace(
        gathered=jax.tree.map(add, at.gathered, grads[level.name]),
        weight=at.weight + weight.astype(at.weight.dtype),
      )
    new[level.name] = at
  return new, carry, output


def _update(level: Level, at: LevelState) -> LevelState:
  """A level at the end of its period."""
  some = at.weight > 0
  scale = 1 / jnp.where(some, at.weight, 1) if level.reduce == "mean" else 1.0
  # A period without weight: the rule sees ones, where its derivative is finite,
  # and what it says is not taken.
  take = lambda g: jnp.where(some, g * jnp.asarray(scale, g.dtype), 1)
  gradient = jax.tree.map(take, at.gathered)
  updates, rule = level.rule.update(gradient, at.rule, at.params)
  select = lambda new, old: jnp.where(some, new, old)
  moved = optax.apply_updates(at.params, updates)
  if level.on_slower_update:
    zero = lambda g: jnp.where(some, g, 0)
    at = at._replace(gradient=jax.tree.map(zero, gradient))
  return at._replace(
    params=jax.tree.map(select, moved, at.params),
    rule=jax.tree.map(select, rule, at.rule),
    gathered=jax.tree.map(jnp.zeros_like, at.gathered),
    weight=jnp.zeros_like(at.weight),
    clock=jnp.zeros_like(at.clock),
  )


def _restart(level: Level, at: LevelState) -> LevelState:
  """A level whose next slower one has updated (eq. 72)."""
  start, params = level.on_slower_update(at.start, at.params, at.gradient)
  return at._replace(start=start, params=params, rule=level.rule.init(params))


def _update_due(levels: Sequence[Level], state: State) -> State:
  """The levels whose period is over, by their clocks."""
  below = None
  for level in levels:
    if level.period is not None:
      state = _update_if_due(level, below, state)
      below = level
  return state


def _update_if_due(level: Level, below: Level | None, state: State) -> State:
  """One level, and the restart of the next faster one, where due."""
  at, new = state[level.name], dict(state)
  due = at.clock >= level.period
  new[level.name] = _where(due, _update(level, at), at)
  if below is not None and below.on_slower_update is not None:
    # Its period divides this one, so it has just updated.
    now = state[below.name]
    new[below.name] = _where(due, _restart(below, now), now)
  return new


def _where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _nested(
  unit: Callable, learning: Sequence[Level], held: Any, xs: Tree
) -> tuple[Any, Tree]:
  """Units from clocks at 0: a scan over the periods of the slowest level.

  What is left behind the last whole period runs through the faster levels, and
  stays open.
  """
  if not learning:
    return _scan(unit, held, xs)
  *faster, level = learning
  count = jax.tree.leaves(xs)[0].shape[0]
  whole = count // level.period

  def period(held, xs):
    (state, carry), outputs = _nested(unit, faster, held, xs)
    # Not due where a unit was not there.
    below = faster[-1] if faster else None
    return (_update_if_due(level, below, state), carry), outputs

  head = jax.tree.map(
    lambda x: x[: whole * level.period].reshape(
      (whole, level.period) + x.shape[1:]
    ),
    xs,
  )
  rest = jax.tree.map(lambda x: x[whole * level.period :], xs)
  parts = []
  if whole:
    held, outputs = _scan(period, held, head)
    flat = lambda x: x.reshape((-1,) + x.shape[2:])
    parts.append(jax.tree.map(flat, outputs))
  if count % level.period or not whole:
    held, outputs = _nested(unit, faster, held, rest)
    parts.append(outputs)
  return held, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _scan(body: Callable, held: Any, xs: Tree) -> tuple[Any, Tree]:
  # A scan already keeps XLA from merging the recomputation.
  return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), held, xs)


def _wide(tree: Tree) -> jnp.dtype:
  """The dtype of weights summed beside a tree."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
