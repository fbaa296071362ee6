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
      reduced one of the level's own last period. Its rule is reset.
    full: that gradient is by `start` instead, through all updates since the
      last restart (MAML): the units since then are kept and run again.
  """

  name: str
  period: int | None
  rule: optax.GradientTransformation
  reduce: str = "mean"
  on_slower_update: OnSlowerUpdate | None = None
  full: bool = False

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


class Replay(NamedTuple):
  """What a level with `full` keeps since its last restart.

  Attributes:
    state: of itself and the faster levels, then.
    carry: of the loss, then.
    xs: the units since then, leaves [units of the next slower level,...].
  """

  state: Any
  carry: Tree
  xs: Tree


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
    replay: `Replay`; () without `full`.
  """

  params: Tree
  start: Tree
  gradient: Tree
  rule: Tree
  gathered: Tree
  weight: jax.Array
  clock: jax.Array
  replay: Any = ()


State = dict[str, LevelState]


def nested_init(
  levels: Sequence[Level],
  params: Mapping[str, Tree],
  carry: Tree = None,
  x: Tree = None,
) -> State:
  """The state at the start of a sequence.

  Args:
    levels: fastest first.
    params: initial weights by level name.
    carry, x: like those of `nested_scan`, and one unit; for levels with `full`.

  Raises:
    ValueError: periods that do not divide each other, names that differ, a
      level with `full` without carry and unit.
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
  for below, level in _restarting(levels):
    if below.full:
      if x is None:
        raise ValueError(
          f"level {below.name!r} has `full`: nested_init needs carry and x"
        )
      units = lambda v, n=level.period: jnp.zeros((n, *v.shape), v.dtype)
      kept = Replay(_up_to(below, levels, state), carry, jax.tree.map(units, x))
      state[below.name] = state[below.name]._replace(replay=kept)
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

  run = _Runner(loss_fn, tuple(levels), first_order)
  if fresh:
    held, outputs = run.nested(run.learning, (state, carry), xs)
  else:
    held, outputs = _scan(run.step, (state, carry), xs)
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
  run = _Runner(loss_fn, tuple(levels), first_order)
  (state, carry), output = run.step((state, carry), x)
  return state, carry, output


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


@dataclasses.dataclass(frozen=True)
class _Runner:
  """What runs units: the loss, all levels, and the order of the gradient."""

  loss_fn: LossFn
  levels: tuple[Level, ...]
  first_order: bool

  @property
  def learning(self) -> tuple[Level, ...]:
    return tuple(x for x in self.levels if x.period is not None)

  def step(self, held: Any, x: Tree) -> tuple[Any, Tree]:
    """One unit and the updates that are due, by the clocks."""
    state, carry = held
    for faster, level in _restarting(self.levels):
      if faster.full:
        at = state[faster.name]
        at = at._replace(
          replay=_remember(faster, level, self.levels, state, carry, x)
        )
        state = {**state, faster.name: at}
    (state, carry), output = self.unit((state, carry), x)
    below: Level | None = None
    for level in self.learning:
      kept = state[below.name].replay if below else None
      state = self.update_if_due(level, below, state, kept)
      below = level
    return (state, carry), output

  @jax.named_scope("unit")
  def unit(self, held: Any, x: Tree, measure: bool = False) -> tuple[Any, Tree]:
    """One unit without updates: its gradient is added to what is gathered.

    With `measure`, (loss, weight) instead of the unit's output.
    """
    state, carry = held
    frozen = {
      v.name: state[v.name].params for v in self.levels if v.period is None
    }
    learned = {v.name: state[v.name].params for v in self.learning}

    def loss(learned):
      return self.loss_fn({**frozen, **learned}, carry, x)

    (value, (carry, weight, output)), grads = jax.value_and_grad(
      loss, has_aux=True
    )(learned)
    if self.first_order:
      grads = jax.lax.stop_gradient(grads)
    # A unit of padding adds exactly 0, whatever its gradient.
    real = weight > 0
    there = weight >= 0
    weight = jnp.maximum(weight, 0)
    new = {}
    for level in self.levels:
      at = state[level.name]
      # A level that never updates counts up to 2^31 - 1, and no further.
      later = optax.safe_increment(at.clock)
      at = at._replace(clock=jnp.where(there, later, at.clock))
      if level.period is not None:
        add = lambda sum_, g: sum_ + jnp.where(real, g, 0).astype(sum_.dtype)
        at = at._replace(
          gathered=jax.tree.map(add, at.gathered, grads[level.name]),
          weight=at.weight + weight.astype(at.weight.dtype),
        )
      new[level.name] = at
    output = (jnp.where(real, value, 0), weight) if measure else output
    return (new, carry), output

  def update_if_due(
    self,
    level: Level,
    below: Level | None,
    state: State,
    kept: Replay | None,
  ) -> State:
    """One level, and the restart of the next faster one, where due."""
    at, new = state[level.name], dict(state)
    assert level.period is not None  # One of `learning`.
    due = at.clock >= level.period
    with jax.named_scope(f"update/{level.name}"):
      new[level.name] = _where(due, _update(level, at), at)
    if below is not None and below.on_slower_update is not None:
      # Its period divides this one, so it has just updated.
      now = state[below.name]
      gradient = now.gradient
      if below.full:
        assert isinstance(kept, Replay)
        gradient = self.through(below, kept)
      new[below.name] = _where(due, _restart(below, now, gradient), now)
    return new

  def through(self, below: Level, kept: Replay) -> Tree:
    """The gradient of a level's last period by its start (MAML)."""
    assert below.period is not None  # One of `learning`.
    period = below.period
    known = self.learning[: self.learning.index(below) + 1]
    frozen = {v.name: v for v in self.levels if v.period is None}

    def last(start: Tree) -> jax.Array:
      at = kept.state[below.name]._replace(params=start)
      held = ({**kept.state, below.name: at}, kept.carry)
      unit = lambda held, x: run.unit(held, x, measure=True)
      _, (losses, weights) = run.nested(known, held, kept.xs, unit)
      loss = losses[-period:].sum()
      weight = weights[-period:].sum()
      mean = loss / jnp.where(weight > 0, weight, 1)
      return mean if below.reduce == "mean" else loss

    run = dataclasses.replace(
      self,
      levels=tuple(
        x if x in known or x.name in frozen
        else dataclasses.replace(x, period=None)
        for x in self.levels
      ),
    )  # fmt: skip
    gradient = jax.grad(last)(kept.state[below.name].params)
    return jax.lax.stop_gradient(gradient) if self.first_order else gradient

  def nested(
    self,
    learning: Sequence[Level],
    held: Any,
    xs: Tree,
    unit: Callable | None = None,
  ) -> tuple[Any, Tree]:
    """Units from clocks at 0: a scan over the periods of the slowest level.

    What is left behind the last whole period runs through the faster levels,
    and stays open.
    """
    unit = unit or self.unit
    if not learning:
      return _scan(unit, held, xs)
    *faster, level = learning
    count = jax.tree.leaves(xs)[0].shape[0]
    whole = count // level.period
    below = faster[-1] if faster else None

    def period(held, xs):
      begin = _up_to(below, self.levels, held[0]) if below else None
      kept = Replay(begin, held[1], xs)
      (state, carry), outputs = self.nested(faster, held, xs, unit)
      # Not due where a unit was not there.
      return (self.update_if_due(level, below, state, kept), carry), outputs

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
      if below is not None and below.full:  # An open period is to be kept.
        held, outputs = _scan(self.step, held, rest)
      else:
        held, outputs = self.nested(faster, held, rest, unit)
      parts.append(outputs)
    return held, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _restarting(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
  """(a level, the next slower one) of those that learn."""
  learning = [x for x in levels if x.period is not None]
  return list(zip(learning, learning[1:]))


def _up_to(below: Level, levels: Sequence[Level], state: State) -> State:
  """The state as it is run again: of `below` and what is faster or frozen.

  Slower levels stand still there, and are given as frozen ones.
  """
  kept, found = {}, False
  for level in levels:
    at = state[level.name]
    if level.period is None or not found:
      kept[level.name] = at
    else:
      kept[level.name] = at._replace(
        rule=(), gathered=(), start=(), gradient=(), replay=()
      )
    found = found or level is below
  kept[below.name] = kept[below.name]._replace(replay=())
  return kept


def _remember(
  below: Level,
  level: Level,
  levels: Sequence[Level],
  state: State,
  carry: Tree,
  x: Tree,
) -> Replay:
  """What was kept since the restart, and a unit more."""
  kept, clock = state[below.name].replay, state[level.name].clock
  new = (_up_to(below, levels, state), carry)
  old = (kept.state, kept.carry)
  put = lambda xs, v: jax.lax.dynamic_update_index_in_dim(xs, v, clock, 0)
  begun, carry = _where(clock == 0, new, old)
  return Replay(begun, carry, jax.tree.map(put, kept.xs, x))


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


def _restart(level: Level, at: LevelState, gradient: Tree) -> LevelState:
  """A level whose next slower one has updated (eq. 72)."""
  assert level.on_slower_update is not None  # Of `_restarting`.
  start, params = level.on_slower_update(at.start, at.params, gradient)
  return at._replace(start=start, params=params, rule=level.rule.init(params))


def _where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _scan(body: Callable, held: Any, xs: Tree) -> tuple[Any, Tree]:
  # A scan already keeps XLA from merging the recomputation.
  return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), held, xs)


def _wide(tree: Tree) -> jnp.dtype:
  """The dtype of weights summed beside a tree."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
