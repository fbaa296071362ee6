"""Update periods by parameter group: the optimizer-level continuum memory.

Paper eq. 71: the parameters of level l stay as they are for a period of C_l
units and then take one step on everything gathered in it,

    theta_l <- theta_l - sum_{t in the last C_l} eta_t f(theta_l; x_t).

The printed range has C_l + 1 terms; here it is exactly C_l. A unit is a step or
a token. Periods shorter than a sequence do not concern the optimizer.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.optim import _checks, _labels

Tree = Any


class MultiFrequencyState(NamedTuple):
  """State of `multi_frequency`; every field is a dict with a key a label.

  Frozen groups have no key. Leaves of other groups are `optax.MaskedNode`.

  Attributes:
    phase: int32 scalars, units gathered since the group last fired.
    n_acc: int32 scalars, steps gathered since then.
    fired: int32 scalars, how often the group has fired.
    acc: what was gathered, like the parameters; only for groups that wait.
    inner: states of the inner optimizers.
  """

  phase: dict[str, jax.Array]
  n_acc: dict[str, jax.Array]
  fired: dict[str, jax.Array]
  acc: dict[str, Tree]
  inner: dict[str, optax.OptState]


def cms_periods(
  max_chunk: int, freqs: Mapping[str, int]
) -> dict[str, int | None]:
  """Periods C_l = max_chunk / f_l of levels with relative frequencies f_l.

  Args:
    max_chunk: the period of a level of frequency 1, in units.
    freqs: frequencies by label; 0 is a frozen group.

  Raises:
    ValueError: a frequency is negative or does not divide `max_chunk`.
  """
  for label, freq in freqs.items():
    if freq < 0 or (freq and max_chunk % freq):
      raise ValueError(
        f"frequency of {label!r} must divide {max_chunk=}, got {freq}"
      )
  return {k: max_chunk // freq if freq else None for k, freq in freqs.items()}


def reclock_schedule(schedule: optax.Schedule, period: int) -> optax.Schedule:
  """A schedule whose k-th call by a slow group sees `schedule(k * period)`.

  Inner optimizers count firings; this keeps their schedules in outer steps.
  """
  return lambda count: schedule(count * period)


def multi_frequency(
  inner: optax.GradientTransformation
  | Mapping[str, optax.GradientTransformation],
  periods: Mapping[str, int | None],
  labels: _labels.Labels,
  *,
  unit: str = "steps",
  tokens_per_step: int | None = None,
  reduce: str = "sum",
  accumulate: str = "gradients",
  mode: str = "select",
  acc_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer a group, each at the end of its own period (eq. 71).

  A group gathers for a period, then its optimizer runs once and its parameters
  move; in between its update is zero. Schedules, step counts and decoupled
  weight decay of `inner` act once a firing (`reclock_schedule`). Clip by global
  norm before this transform, not inside. To flush a partial last period call
  `update(..., fire={label: True})`; Python bools leave no conditional behind.

  Args:
    inner: the optimizer of every group, or a mapping from label to optimizer.
    periods: units between two updates, by label. 0 and 1 are every step, None
      is a frozen group: zero updates and no state.
    labels: tree (or prefix tree) of labels like the parameters, or a callable
      that makes it; a callable must tolerate `optax.MaskedNode`.
    unit: "steps" or "tokens".
    tokens_per_step: tokens an update stands for, with unit="tokens"; None
      reads the extra argument `tokens=` of every update.
    reduce: "sum" (eq. 71) or "mean" over the gathered steps.
    accumulate: "gradients" runs the inner optimizer once, on the gathered
      gradient; "updates" runs it every step and gathers what it returns.
    mode: "select" computes the inner optimizer every step and keeps or drops
      the result; "cond" skips it between firings.
    acc_dtype: of the gathered tree; wider leaves keep their own dtype.

  Returns:
    A transformation with state `MultiFrequencyState`.

  Raises:
    ValueError: an unknown switch, a bad period, a label without a period or
      without an optimizer; at the first update, tokens that are not given.

  References: arXiv 2512.24695, eq. 70-71.
  """
  _checks.one_of("unit", unit, ("steps", "tokens"))
  _checks.one_of("reduce", reduce, ("sum", "mean"))
  _checks.one_of("accumulate", accumulate, ("gradients", "updates"))
  _checks.one_of("mode", mode, ("select", "cond"))
  known = _Groups(inner, periods, labels)
  each_step = tokens_per_step if unit == "tokens" else 1
  waits = {k: _waits(k, p, each_step) for k, p in known.periods.items()}

  def step_units(tokens):
    if unit == "steps":
      return 1
    if tokens_per_step is None and tokens is None:
      raise ValueError(
        "unit='tokens' needs the number of tokens: pass tokens_per_step= to "
        "multi_frequency or tokens= to update"
      )
    if tokens_per_step is not None and tokens is not None:
      raise ValueError(
        "tokens= of update needs tokens_per_step=None, got "
        f"tokens_per_step={tokens_per_step}"
      )
    return jnp.asarray(tokens_per_step if tokens is None else tokens, jnp.int32)

  def init(params):
    groups = known.split(params)
    zero = lambda: {k: jnp.zeros([], jnp.int32) for k in groups}
    acc = {
      k: jax.tree.map(lambda p: _zeros(p, acc_dtype), group)
      for k, group in groups.items()
      if waits[k]
    }
    states = {k: known.inner[k].init(group) for k, group in groups.items()}
    return MultiFrequencyState(zero(), zero(), zero(), acc, states)

  def update(updates, state, params=None, *, fire=None, tokens=None, **extra):
    fire = {} if fire is None else fire
    known.check_fire(fire, waits)
    units = step_units(tokens)
    named = known.resolve(updates)
    new = MultiFrequencyState({}, {}, {}, {}, {})
    outputs = {}
    for label, period in known.periods.items():
      group = _labels.select(updates, named, label)
      held = None if params is None else _labels.select(params, named, label)
      tx, inner_state = known.inner[label], state.inner[label]
      step = lambda g, s, tx=tx, p=held: tx.update(g, s, p, **extra)
      step = jax.named_scope(str(label))(step)  # Told apart in a trace.
      phase = state.phase[label] + units
      if waits[label]:
        due = fire.get(label, phase >= period)
        n_acc = state.n_acc[label] + 1
        acc = state.acc[label]
        gather = (
          _gather_gradients if accumulate == "gradients" else (_gather_updates)
        )
        divisor = n_acc if reduce == "mean" else 1
        outputs[label], inner_state, acc = gather(
          step, group, inner_state, acc, due, divisor, mode
        )
        new.acc[label] = acc
      else:
        due, n_acc = True, state.n_acc[label]
        outputs[label], inner_state = step(group, inner_state)
      # Only the remainder is kept: a count of all tokens overflows int32.
      over = jnp.where(phase >= period, phase % max(period, 1), 0)
      new.phase[label] = jnp.where(due, over, phase)
      new.n_acc[label] = jnp.where(due, 0, n_acc)
      fired = optax.safe_increment(state.fired[label])
      new.fired[label] = jnp.where(due, fired, state.fired[label])
      new.inner[label] = inner_state
    frozen = jax.tree.map(jnp.zeros_like, updates)
    return _labels.merge(outputs, named, frozen), new

  return optax.GradientTransformationExtraArgs(init, update)


class _Groups:
  """The optimizers, periods and labels of the groups that are not frozen."""

  def __init__(self, inner: Any, periods: Mapping, labels: _labels.Labels):
    for label, period in periods.items():
      if period is not None and (not _is_int(period) or period < 0):
        raise ValueError(
          f"period of {label!r} must be None or an integer >= 0, got {period!r}"
        )
    self.all = dict(periods)
    self.periods = {k: int(p) for k, p in periods.items() if p is not None}
    if isinstance(inner, Mapping):
      missing = sorted(set(self.periods) - set(inner))
      if missing:
        raise ValueError(f"no inner optimizer for the labels {missing}")
    else:
      inner = dict.fromkeys(self.periods, inner)
    self.inner = {
      k: optax.with_extra_args_support(inner[k]) for k in self.periods
    }
    self.labels = labels
    if not callable(labels):
      self._check(labels)

  def _check(self, labels: Tree) -> None:
    found = {x for x in jax.tree.leaves(labels) if isinstance(x, str)}
    missing = sorted(found - set(self.all))
    if missing:
      raise ValueError(
        f"labels {missing} have no period; periods are given for "
        f"{sorted(self.all)}"
      )

  def resolve(self, tree: Tree) -> Tree:
    named = _labels.resolve(self.labels, tree)
    self._check(named)
    return named

  def split(self, params: Tree) -> dict[str, Tree]:
    # optax.tree.map_params calls init on a placeholder that has no leaves.
    if not jax.tree.leaves(params):
      return dict.fromkeys(self.periods, params)
    named = self.resolve(params)
    return {k: _labels.select(params, named, k) for k in self.periods}

  def check_fire(self, fire: Mapping, waits: Mapping[str, bool]) -> None:
    for label in fire:
      if not waits.get(label):
        raise ValueError(
          f"fire= names {label!r}, but only groups that wait can be fired: "
          f"{sorted(k for k, wait in waits.items() if wait)}"
        )


def _is_int(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _waits(label: str, period: int, each_step: Any) -> bool:
  """Whether the group needs an accumulator."""
  if period <= 1:
    return False
  if not _is_int(each_step):
    return True
  if period < each_step:
    logging.getLogger(__name__).warning(
      "group %r fires every step: its period of %d tokens is less than the %d "
      "tokens of a step", label, period, each_step,
    )  # fmt: skip
  return period > each_step


def _zeros(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  wide = jnp.promote_types(x.dtype, jnp.float32) != jnp.float32
  return jnp.zeros_like(x, dtype=x.dtype if wide else dtype)


def _add(acc: Tree, tree: Tree) -> Tree:
  return jax.tree.map(lambda a, x: a + x.astype(a.dtype), acc, tree)


def _read(acc: Tree, divisor: Any, like: Tree) -> Tree:
  return jax.tree.map(lambda a, x: (a / divisor).astype(x.dtype), acc, like)


def _where(due: jax.Array, yes: Tree, no: Tree) -> Tree:
  return jax.tree.map(lambda a, b: jnp.where(due, a, b), yes, no)


def _cast(tree: Tree, like: Tree) -> Tree:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _gather_gradients(step, group, state, acc, due, divisor, mode):
  """One inner update on what the period gathered; nothing in between."""
  acc = _add(acc, group)

  # Operands and zeros_like: the branches must agree in sharding, and a tree
  # closed over loses its own under an Explicit mesh.
  def go(group, acc, state):
    output, state = step(_read(acc, divisor, group), state)
    return _cast(output, group), state, jax.tree.map(jnp.zeros_like, acc)

  def wait(group, acc, state):
    return jax.tree.map(jnp.zeros_like, group), state, acc

  return _choose(due, go, wait, group, acc, state, mode=mode)


def _gather_updates(step, group, state, acc, due, divisor, mode):
  """An inner update every step with the parameters frozen, summed up."""
  output, state = step(group, state)
  acc = _add(acc, output)

  def go(group, acc):
    output = _read(acc, divisor, group)
    return output, jax.tree.map(jnp.zeros_like, acc)

  def wait(group, acc):
    return jax.tree.map(jnp.zeros_like, group), acc

  output, acc = _choose(due, go, wait, group, acc, mode=mode)
  return output, state, acc


def _choose(due, go, wait, *operands, mode):
  if isinstance(due, bool):
    return go(*operands) if due else wait(*operands)
  if mode == "cond":
    return jax.lax.cond(due, go, wait, *operands)
  return _where(due, go(*operands), wait(*operands))
