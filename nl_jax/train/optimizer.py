"""The outer optimizer: a recipe (docs/mathematics.md 7.1) around periods.

    clip by global norm -> every level at its own period: rule, decay, rate

Clipping stands before the levels, so that what a slow level gathers is what
the fast ones saw. A level that fires every n-th step has a learning rate of
its own clock: its k-th firing takes the rate of step k n. Where the batch has
changed since, so has n, and it is counted from there on (`clocks_of`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax import fields, optim, sharding
from nl_jax.fields import OneOf, Whole
from nl_jax.levels import STEP, LevelRow
from nl_jax.models.leaves import Leaves
from nl_jax.train import groups as groups_lib
from nl_jax.train import options as options_lib
from nl_jax.train import rules, schedules

_MIN_SIDE = 16  # Of a matrix: narrower ones are AdamW's, as gates of heads are.
_MATRIX = optax.contrib.MuonDimensionNumbers(-2, -1)


class Optimizer(NamedTuple):
  """An optimizer, and what describes it.

  Attributes:
    tx: the whole chain: clip, levels, rule, decay, learning rate.
    schedule: step (from 0) -> learning rate of the slow weights.
    labels: params -> tree of level names.
    rows: its rows of the level card.
    groups: what `optim.groups` hold, a line each.
    clocks: by label, the step and the count of firings that its rate is
      counted from, (0, 0) where it is not there; set before `tx` is traced.
    name: of its rule.
    table: of the model's parameters.
  """

  tx: optax.GradientTransformation
  schedule: optax.Schedule
  labels: Callable[[Any], Any]
  rows: tuple[LevelRow, ...]
  groups: tuple[str, ...] = ()
  clocks: dict[str, tuple[int, int]] = {}
  name: str = "adamw"
  table: Leaves = {}

  def chosen(self, params: Any) -> str:
    """Which parameters are the rule's, and which AdamW's, in a line."""
    return _chosen(self.name, self.table, params)


def make(
  model: Any,
  *,
  steps: int,
  tokens_per_step: int,
  learning_rate: Annotated[float, fields.AT_LEAST_0],
  name: Annotated[str, OneOf(*rules.RULES)] = "adamw",
  warmup_steps: Annotated[int, Whole(0)] = 0,
  weight_decay: Annotated[float, fields.AT_LEAST_0] = 0.1,
  clip_norm: Annotated[float, fields.AT_LEAST_0] = 1.0,
  min_ratio: Annotated[float, fields.SHARE] = 0.1,
  schedule: Annotated[str, OneOf(*schedules.NAMES)] = "cosine",
  cooldown_steps: Annotated[int, Whole(0)] = 0,
  groups: tuple[str, ...] = (),
  reduce: Annotated[str, OneOf("mean", "sum")] = "mean",
  nested_meta: Annotated[str, OneOf("none", "reptile", "fomaml")] = "none",
  nested_rate: Annotated[float, fields.SHARE] = 1.0,
  options: Mapping[str, Any] | None = None,
) -> Optimizer:
  """Builds the optimizer of a model from the config group `optim`.

  Args:
    model: its `levels()` labels the parameters; `model.cms` has the levels'
      periods in tokens and the variant.
    steps: of the whole run: the end of the schedule.
    tokens_per_step: tokens of a batch, batch_size * sequence_length; every
      CMS period is a multiple.
    learning_rate: peak learning rate.
    name: the rule; the group of its name has its options.
    warmup_steps: steps of linear warm-up.
    weight_decay: decoupled, multiplied by the learning rate; matrices only.
    clip_norm: global norm of the gradient; 0: no clip.
    min_ratio: the final learning rate divided by the peak.
    schedule: schedule of the learning rate after the warm-up.
    cooldown_steps: steps of decay at the end, for wsd and inverse_root.
    groups: texts of parameters that are frozen, or have a rate or decay of
      their own: pattern:frozen, or pattern:rate=0.1,decay=0
      (docs/optimizers.md).
    reduce: how a slow level combines the gradients that it gathers: "mean", or
      "sum" (literal eq. 71).
    nested_meta: with the CMS variant "nested", how a level's initial state
      learns: "none", "reptile" or "fomaml".
    nested_rate: learning rate of that initial state, 0 to 1.
    options: of the rule, what differs from the defaults of `rules.options`.

  Raises:
    ValueError: an unknown name or option, a value out of range, a period that
      is not a multiple of the batch's tokens.
  """
  fields.check("optim", make, locals())
  fields.check("train", options_lib.Options, {"steps": steps})
  values = rules.filled(name, options or {})
  rates = schedules.make(
    schedule,
    peak=learning_rate,
    warmup_steps=warmup_steps,
    steps=steps,
    min_ratio=min_ratio,
    cooldown_steps=cooldown_steps,
  )
  every = firing_steps(model.cms, tokens_per_step)
  table, labels = model.leaves(), model.levels()[1]
  parts = groups_lib.parse(groups)
  named = groups_lib.label(parts, labels)
  told: tuple[str, ...] = ()
  if parts:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    told = tuple(groups_lib.check(parts, shapes))
    names = sorted(set(jax.tree.leaves(named(shapes))))
  else:
    names = list(every)

  clocks: dict[str, tuple[int, int]] = {}

  def at(label: str) -> optax.GradientTransformation:
    group = groups_lib.of(parts, label)
    factor, decay = 1.0, weight_decay
    if group:
      factor = group.rate
      decay = weight_decay if group.decay is None else group.decay
    n = every[groups_lib.level_of(label)]

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
      step, fired = clocks.get(label, (0, 0))
      value = rates(step + (count - fired) * n)
      return value if factor == 1 else factor * value

    return rules.build(
      name, values, rate, learning_rate, weight_decay=decay,
      mask=decay_mask(table), dims=matrices(table),
    )  # fmt: skip

  def period_of(label: str) -> int | None:
    group = groups_lib.of(parts, label)
    if group and group.frozen:
      return None
    n = every[groups_lib.level_of(label)]
    return 1 if n == 1 else n * tokens_per_step

  levels = optim.multi_frequency(
    {label: at(label) for label in names},
    {label: period_of(label) for label in names},
    named,
    unit="tokens",
    tokens_per_step=tokens_per_step,
    reduce=reduce,
    # Newton-Schulz is dear: only when a level fires.
    mode="cond" if rules.RULES[name].matrices else "select",
  )
  chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if any(group.frozen for group in parts):
    chain.insert(0, _without_frozen(parts, named))
  tx = optax.chain(*chain, levels)
  order = [label for label in every if label != "slow"]
  if model.cms.variant == "nested" and len(order) > 1:
    if any("@" in name and name.startswith("cms/") for name in names):
      raise ValueError(
        "optim.groups cannot hold levels of model.cms.variant='nested', which "
        "restart as a whole; leave blocks/cms out of them"
      )
    tx = optim.reset_on_slower(
      tx, every, labels, order=order, meta=nested_meta, meta_rate=nested_rate
    )
  rows = _rows(name, every, values, tokens_per_step)
  return Optimizer(tx, rates, labels, rows, told, clocks, name, table)


def clocks_of(opt_state: Any, step: int) -> dict[str, tuple[int, int]]:
  """The clocks of all levels where a run continues with another batch.

  Args:
    opt_state: of `Optimizer.tx`.
    step: that it stands at.

  Returns:
    {label: (step at which its open period began, firings so far)}.
  """
  fired = optax.tree.get(opt_state, "fired")
  waiting = optax.tree.get(opt_state, "n_acc")
  return {
    label: (step - int(waiting[label]), int(count))
    for label, count in fired.items()
  }


def _without_frozen(
  parts: Sequence[groups_lib.Group], named: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """Gradients of frozen parameters count for no norm."""

  def kept(label: str, x: jax.Array) -> jax.Array:
    group = groups_lib.of(parts, label)
    return jnp.zeros_like(x) if group and group.frozen else x

  return optax.stateless(
    lambda updates, _: jax.tree.map(kept, named(updates), updates)
  )


def firing_steps(cms: Any, tokens_per_step: int) -> dict[str, int]:
  """Steps between two updates, by label: 1 for "slow", then the CMS levels.

  Args:
    cms: names, fastest first, and their periods in tokens (0: every step).
    tokens_per_step: tokens of a batch.

  Raises:
    ValueError: a period is not a multiple of the batch's tokens.
  """
  every = {"slow": 1}
  if len(cms.levels) == 1:
    return every
  for level, period in zip(cms.levels, cms.periods):
    if period % tokens_per_step:
      below = period // tokens_per_step * tokens_per_step
      nearest = [x for x in (below, below + tokens_per_step) if x]
      raise ValueError(
        f"the period of cms level {level!r} must be a multiple of the tokens "
        f"of a step (data.batch_size * data.sequence_length = "
        f"{tokens_per_step}), got {period}; nearest: "
        + " or ".join(map(str, nearest))
      )
    every[f"cms/{level}"] = max(period // tokens_per_step, 1)
  return every


def decay_mask(table: Leaves) -> Callable[[Any], Any]:
  """Of a model's table: params -> True where weight decay acts."""

  def mask(params: Any) -> Any:
    one = lambda path, _: table[sharding.path_name(path)].decay
    return jax.tree_util.tree_map_with_path(one, params)

  return mask


def matrices(table: Leaves) -> Callable[[Any], Any]:
  """Of a model's table: params -> specs of what a rule for matrices learns.

  None: AdamW's.
  """

  def specs(params: Any) -> Any:
    def one(path: tuple, leaf: Any) -> Any:
      masked = isinstance(leaf, optax.MaskedNode)
      if masked or not table[sharding.path_name(path)].matrix:
        return None
      return _MATRIX if min(leaf.shape[-2:]) >= _MIN_SIDE else None

    masked = lambda x: isinstance(x, optax.MaskedNode)
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=masked)

  return specs


def _chosen(name: str, table: Leaves, params: Any) -> str:
  if not rules.RULES[name].matrices:
    return f"optimizer: {name} for all parameters"
  is_spec = lambda x: (
    x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
  )
  specs = jax.tree.leaves(matrices(table)(params), is_leaf=is_spec)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  count = sum(x.size for (_, x), spec in zip(leaves, specs) if spec)
  share = count / max(sum(x.size for _, x in leaves), 1)
  others = [
    sharding.path_name(path)
    for (path, _), spec in zip(leaves, specs)
    if not spec
  ]
  return (
    f"optimizer: {name} for {count:,} parameters in matrices ({share:.1%}), "
    f"adamw for {', '.join(others)}"
  )


def _rows(
  name: str,
  every: Mapping[str, int],
  values: Mapping[str, Any],
  tokens_per_step: int,
) -> tuple[LevelRow, ...]:
  """The momenta of each group: levels that learn from its gradients."""
  rows = []
  for label, period in every.items():
    chunks = {"momenta": period}
    if values.get("alpha") and "slow_every" in values:
      chunks["slow momentum"] = period * values["slow_every"]
    rows += [
      LevelRow(
        name=f"{name} {what} of {label}",
        kind="optimizer state",
        chunk=STEP if steps == 1 else steps * tokens_per_step,
        objective="compress gradients",
        rule="EMA",
        transfer="generation",
        frozen=True,
      )
      for what, steps in chunks.items()
    ]
  return tuple(rows)
