"""The outer optimizer: the recipe of model.md 7.1 around the levels' periods.

    clip by global norm -> every level at its own period: rule, decay, rate

Clipping stands before the levels, so that what a slow level gathers is what
the fast ones saw. A level that fires every n-th step has a learning rate of
its own clock: its k-th firing takes the rate of step k n.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax import card, fields, optim, sharding
from nl_jax.fields import OneOf, Whole
from nl_jax.train import settings

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
  """

  tx: optax.GradientTransformation
  schedule: optax.Schedule
  labels: Callable[[Any], Any]
  rows: tuple[card.Row, ...]


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
    steps: of the whole run: the end of the cosine.
    tokens_per_step: tokens of a batch, batch_size * sequence_length; every
      CMS period is a multiple.
    learning_rate: peak.
    name: a key of `RULES`.
    warmup_steps: steps of linear warm-up.
    weight_decay: decoupled, multiplied by the learning rate; matrices only.
    clip_norm: global norm of the gradient; 0: no clip.
    min_ratio: the last learning rate over the peak.
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
  rates = schedule(learning_rate, warmup_steps, steps, min_ratio)
  every = firing_steps(model.cms, tokens_per_step)
  labels = model.levels()[1]

  def at(period: int) -> optax.GradientTransformation:
    rate = optim.reclock_schedule(rates, period)
    return _build(name, rate, weight_decay, adam, options)

  levels = optim.multi_frequency(
    {label: at(period) for label, period in every.items()},
    {k: 1 if n == 1 else n * tokens_per_step for k, n in every.items()},
    labels,
    unit="tokens",
    tokens_per_step=tokens_per_step,
    reduce=reduce,
    # Newton-Schulz is dear: only when a level fires.
    mode="cond" if RULES[name].matrices else "select",
  )
  chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  tx = optax.chain(*chain, levels)
  order = [label for label in every if label != "slow"]
  if getattr(model.cms, "variant", "") == "nested" and len(order) > 1:
    tx = optim.reset_on_slower(
      tx, every, labels, order=order, meta=nested_meta, meta_rate=nested_rate
    )
  rows = _rows(name, every, options, tokens_per_step)
  return Optimizer(tx, rates, labels, rows)


def schedule(
  peak: float, warmup_steps: int, steps: int, min_ratio: float
) -> optax.Schedule:
  """Linear warm-up, then half a cosine down to `min_ratio * peak`.

  Step i (from 0) of the warm-up has rate peak (i + 1) / warmup_steps, so that
  no step is lost at rate 0; the last step has min_ratio * peak.
  """
  last = max(steps - 1 - warmup_steps, 1)

  def rate(count: jax.typing.ArrayLike) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warm = (count + 1) / max(warmup_steps, 1)
    done = jnp.clip((count - warmup_steps) / last, 0, 1)
    fall = min_ratio + (1 - min_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return peak * jnp.where(count < warmup_steps, warm, fall)

  return rate


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
