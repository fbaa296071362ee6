"""The outer optimizer: the recipe of model.md 7.1 around the levels' periods.

    clip by global norm -> every level at its own period: rule, decay, rate

Clipping stands before the levels, so that what a slow level gathers is what
the fast ones saw. A level that fires every n-th step has a learning rate of
its own clock: its k-th firing takes the rate of step k n. Where the batch has
changed since, so has n, and it is counted from there on (`clocks_of`).
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax import card, fields, optim, sharding
from nl_jax.fields import OneOf, Whole
from nl_jax.train import groups as groups_lib
from nl_jax.train import schedules, settings

# By path: no parameter of these is a matrix that should shrink to zero.
_NO_DECAY = re.compile(
  r"(^|/)([^/]*norm[^/]*/.*|conv_\w+|b_\w+|bias|scale|mix|A_log|D_skip)$"
)
# Narrower matrices, as gates of heads, are AdamW's; stacked vectors too.
_MIN_SIDE = 16
_NO_MATRIX = (r"(^|/)(conv_\w+|b_\w+|mix)$",)


class _Rule(NamedTuple):
  """How a named optimizer is made.

  Attributes:
    factory: (learning_rate, *, weight_decay, mask, **options).
    preset: options that the name stands for.
    matrices: it is for matrices, and takes a fallback for what is none.
  """

  factory: Callable[..., optax.GradientTransformation]
  preset: Mapping[str, Any] = {}
  matrices: bool = False


RULES = {
  "adamw": _Rule(optax.adamw),
  "adam_memory": _Rule(optim.adam_memory),
  "deep_momentum": _Rule(optim.deep_momentum, matrices=True),
  "delta_momentum": _Rule(optim.delta_momentum),
  "m3": _Rule(optim.m3, matrices=True),
  # M3 without slow memory and second moment.
  "muon": _Rule(optim.m3, {"alpha": None, "second_moment": None}, True),
}
_M3_EVERY = inspect.signature(optim.m3).parameters["slow_every"].default
# Set by the recipe, not by options.
_RESERVED = ("weight_decay", "mask", "fallback", "dims")


class Optimizer(NamedTuple):
  """An optimizer and what is told of it.

  Attributes:
    tx: the whole chain: clip, levels, rule, decay, learning rate.
    schedule: step (from 0) -> learning rate of the slow weights.
    labels: params -> tree of level names.
    rows: its rows of the level card.
    groups: what `optim.groups` hold, a line each.
    clocks: by label, the step and the count of firings that its rate is
      counted from, (0, 0) where it is not there; set before `tx` is traced.
  """

  tx: optax.GradientTransformation
  schedule: optax.Schedule
  labels: Callable[[Any], Any]
  rows: tuple[card.Row, ...]
  groups: tuple[str, ...] = ()
  clocks: dict[str, tuple[int, int]] = {}


def make(
  model: Any,
  *,
  steps: int,
  tokens_per_step: int,
  learning_rate: Annotated[float, fields.AT_LEAST_0],
  name: Annotated[str, OneOf(*RULES)] = "adamw",
  warmup_steps: Annotated[int, Whole(0)] = 0,
  weight_decay: Annotated[float, fields.AT_LEAST_0] = 0.1,
  clip_norm: Annotated[float, fields.AT_LEAST_0] = 1.0,
  min_ratio: Annotated[float, fields.SHARE] = 0.1,
  schedule: Annotated[str, OneOf(*schedules.NAMES)] = "cosine",
  cooldown_steps: Annotated[int, Whole(0)] = 0,
  groups: tuple[str, ...] = (),
  b1: Annotated[float, fields.DECAY] = 0.9,
  b2: Annotated[float, fields.DECAY] = 0.95,
  eps: Annotated[float, fields.POSITIVE] = 1e-8,
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
    learning_rate: peak.
    name: a key of `RULES`.
    warmup_steps: steps of linear warm-up.
    weight_decay: decoupled, multiplied by the learning rate; matrices only.
    clip_norm: global norm of the gradient; 0: no clip.
    min_ratio: the last learning rate over the peak.
    schedule: of the learning rate, after the warm-up.
    cooldown_steps: at the end, of wsd and inverse_root.
    groups: texts of parameters that are frozen, or have a rate or decay of
      their own: pattern:frozen, or pattern:rate=0.1,decay=0 (optimizers.md).
    b1: AdamW's decay of the first moment, here and below where AdamW is the
      rule, or serves what is no matrix.
    b2: AdamW's decay of the second moment.
    eps: AdamW's, added to the root of the second moment.
    reduce: of the gradients that a slow level gathers: "mean", or "sum"
      (literal eq. 71).
    nested_meta: with the CMS variant "nested", how a level's initial state
      learns: "none", "reptile" or "fomaml".
    nested_rate: of that, 0 to 1.
    options: keyword arguments of another rule than AdamW.

  Raises:
    ValueError: an unknown name or option, a value out of range, a period that
      is no multiple of the batch's tokens.
  """
  fields.check("optim", make, locals())
  fields.check("train", settings.Settings, {"steps": steps})
  adam = {"b1": b1, "b2": b2, "eps": eps}
  options = _options(name, options or {})
  rates = schedules.make(
    schedule,
    peak=learning_rate,
    warmup_steps=warmup_steps,
    steps=steps,
    min_ratio=min_ratio,
    cooldown_steps=cooldown_steps,
  )
  every = firing_steps(model.cms, tokens_per_step)
  labels = model.levels()[1]
  parts = groups_lib.parse(groups)
  named = groups_lib.label(parts, labels)
  told = ()
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

    return _build(name, rate, decay, adam, options)

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
    mode="cond" if RULES[name].matrices else "select",
  )
  chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if any(group.frozen for group in parts):
    chain.insert(0, _without_frozen(parts, named))
  tx = optax.chain(*chain, levels)
  order = [label for label in every if label != "slow"]
  if getattr(model.cms, "variant", "") == "nested" and len(order) > 1:
    if any("@" in name and name.startswith("cms/") for name in names):
      raise ValueError(
        "optim.groups cannot hold levels of model.cms.variant='nested', which "
        "restart as a whole; leave blocks/cms out of them"
      )
    tx = optim.reset_on_slower(
      tx, every, labels, order=order, meta=nested_meta, meta_rate=nested_rate
    )
  rows = _rows(name, every, options, tokens_per_step)
  return Optimizer(tx, rates, labels, rows, told, clocks)


def clocks_of(opt_state: Any, step: int) -> dict[str, tuple[int, int]]:
  """The clocks of all levels where a run goes on with another batch.

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
    ValueError: a period is no multiple of the batch's tokens.
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


def decay_mask(params: Any) -> Any:
  """True where weight decay acts: matrices, initial memory states included.

  By path, the stacked layer axis taken away: a stacked norm (L,D) is no matrix.
  """

  def decays(path: tuple, leaf: jax.Array) -> bool:
    name = sharding.path_name(path)
    rank = leaf.ndim - name.startswith("blocks/")
    return rank >= 2 and not _NO_DECAY.search(name)

  return jax.tree_util.tree_map_with_path(decays, params)


def _build(
  name: str,
  rate: optax.Schedule,
  weight_decay: float,
  adam: Mapping[str, float],
  options: Mapping[str, Any],
) -> optax.GradientTransformation:
  """The rule of one level."""
  rule = RULES[name]
  decay = {"weight_decay": weight_decay, "mask": decay_mask}
  adamw = optax.adamw(rate, **adam, **decay)
  if rule.factory is optax.adamw:
    return adamw
  routing = {"fallback": adamw, "dims": _matrices} if rule.matrices else {}
  return rule.factory(rate, **decay, **routing, **rule.preset, **options)


def _matrices(params: Any) -> Any:
  exclude = (*optim.DEFAULT_EXCLUDE, *_NO_MATRIX)
  return optim.matrix_dims_from_paths(
    params, exclude=exclude, min_dim=_MIN_SIDE
  )


def _options(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
  """The options, checked against the rule's signature.

  Raises:
    ValueError: an unknown name or option.
  """
  if name not in RULES:
    raise ValueError(
      f"optim.name must be one of {', '.join(RULES)}; got {name!r}"
    )
  rule = RULES[name]
  known = list(inspect.signature(rule.factory).parameters)[1:]
  known = [k for k in known if k not in (*_RESERVED, *rule.preset)]
  if name == "adamw":
    known = []
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(
      f"optim.name={name!r} has no option {', '.join(unknown)}; it has "
      f"{', '.join(known) or 'none but b1, b2 and eps'}"
    )
  return options


def _rows(
  name: str,
  every: Mapping[str, int],
  options: Mapping[str, Any],
  tokens_per_step: int,
) -> tuple[card.Row, ...]:
  """The momenta of each group: levels that learn from its gradients."""
  rows = []
  for label, period in every.items():
    chunks = {"momenta": period}
    if name == "m3":
      chunks["slow momentum"] = period * options.get("slow_every", _M3_EVERY)
    rows += [
      card.Row(
        name=f"{name} {what} of {label}",
        kind="optimizer state",
        chunk=card.STEP if steps == 1 else steps * tokens_per_step,
        objective="compress gradients",
        rule="EMA",
        transfer="generation",
        frozen=True,
      )
      for what, steps in chunks.items()
    ]
  return tuple(rows)
