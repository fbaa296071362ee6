"""The rules of the outer optimizer, and the config group of each.

`optim.name` chooses a rule; the group of its name, as `optim.m3`, has what its
factory takes, with the factory's defaults. In a config "none" stands for None
where names are chosen, and 0 where a number is. What the recipe sets, or what
no text can say, is not a field: schedule, decay and its mask, which leaves are
matrices, where Newton-Schulz is spread.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import optax

from nl_jax import fields, optim
from nl_jax.fields import Field, OneOf, Whole

NONE = "none"
DEFAULT = "adamw"


class Rule(NamedTuple):
  """How a named optimizer is made.

  Attributes:
    factory: (learning_rate, *, weight_decay, mask, **options).
    about: functions whose docstrings say what the options mean.
    matrices: it is for matrices, and takes a fallback for what is none.
    hidden: what the recipe leaves no use for.
  """

  factory: Callable[..., optax.GradientTransformation]
  about: tuple[Callable[..., Any], ...] = ()
  matrices: bool = False
  hidden: tuple[str, ...] = ()


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: Annotated[float, fields.DECAY] = 0.9,
  b2: Annotated[float, fields.DECAY] = 0.95,
  eps: Annotated[float, fields.POSITIVE] = 1e-8,
  nesterov: bool = False,
  *,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  """optax's AdamW with the decay of language models.

  Args:
    b1: decay of the first moment; ours.
    b2: decay of the second moment; ours.
    eps: added to the root of the second moment; ours.
    nesterov: Nesterov's momentum.
  """
  return optax.adamw(
    learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask,
    nesterov=nesterov,
  )  # fmt: skip


RULES = {
  "adamw": Rule(adamw),
  "adam_memory": Rule(optim.adam_memory, (optim.scale_by_adam_memory,)),
  # Leaves that are not matrices are AdamW's, and never a vector rule's.
  "deep_momentum": Rule(
    optim.deep_momentum, (optim.scale_by_deep_momentum,), True,
    ("vector_rule", "ns_eps"),
  ),
  "delta_momentum": Rule(
    optim.delta_momentum, (optim.scale_by_delta_momentum,)
  ),
  "m3": Rule(optim.m3, (optim.scale_by_m3,), True),
  "muon": Rule(optim.muon, (optim.m3, optim.scale_by_m3), True),
}  # fmt: skip

# Set by the recipe.
_RECIPE = ("learning_rate", "weight_decay", "mask", "dims", "fallback")
# Arguments that are groups: what a config calls their fields.
_GROUPS = {
  "ns": (
    optim.NewtonSchulz,
    {"coeffs": "coeffs", "eps": "ns_eps", "dtype": "ns_dtype"},
  ),
  "dtypes": (
    optim.StateDtypes,
    {
      "m1": "mu_dtype", "nu": "nu_dtype", "slow": "slow_dtype",
      "o2": "o2_dtype",
    },
  ),
}  # fmt: skip
_FALLBACK = "fallback_"  # Of AdamW for what is not a matrix.
_PRECONDITIONERS = {
  "diag": optim.diag_preconditioner,
  "left_gram": optim.left_gram_preconditioner,
  "orthogonal": optim.orthogonal_preconditioner,
}
# Names that a choice has where no annotation lists them.
_NAMES = {
  "coeffs": OneOf(*optim.NS_COEFFS, "eq44"),
  "output": OneOf(NONE, "orthogonalize"),
  "preconditioner": OneOf(NONE, *_PRECONDITIONERS),
}
_DTYPES = OneOf(NONE, "float32", "bfloat16", "float16")
_BOUNDS = {
  "delta_momentum.alpha": fields.DECAY,
  "deep_momentum.alpha": fields.DECAY,
  "b1": fields.DECAY,
  "b2": fields.DECAY,
  "b3": fields.DECAY,
  "target_decay": fields.DECAY,
  "ns_steps": Whole(0, 100),
  "slow_every": Whole(1),
}
# What a choice leaves unread: (rule, field, value) -> fields.
_UNREAD = {
  ("m3", "alpha", 0.0): (
    "b3", "slow_every", "chunk_reduce", "slow_read", "cache_slow", "stagger",
    "slow_dtype", "o2_dtype",
  ),
  ("m3", "second_moment", NONE): ("b2", "eps", "nu_dtype"),
  ("m3", "cache_slow", False): ("o2_dtype",),
  ("m3", "ns_steps", 0): ("coeffs", "ns_eps", "ns_dtype"),
  ("muon", "ns_steps", 0): ("coeffs", "ns_eps", "ns_dtype"),
  ("delta_momentum", "key", "raw"): ("eps",),
  ("delta_momentum", "granularity", "tensor"): ("side",),
  ("delta_momentum", "granularity", "element"): ("side",),
  ("deep_momentum", "output", NONE): ("ns_steps", "coeffs", "ns_dtype"),
  ("deep_momentum", "memory", "linear"): (
    "hidden", "depth", "activation", "residual", "seed", "inner_lr",
    "inner_step", "loss", "decay_layers",
  ),
  ("deep_momentum", "memory", "mlp"): ("eta",),
}  # fmt: skip


def options(name: str) -> dict[str, Field]:
  """The fields of the group `optim.<name>`, in a config's order.

  Raises:
    ValueError: no such rule.
  """
  rule = RULES[check_name(name)]
  found = fields.of(rule.factory)
  parameters = inspect.signature(rule.factory).parameters
  made: dict[str, Field] = {}
  for key in parameters:
    if key == "memory":
      made |= _memory()
    elif key in _GROUPS:
      kind, names = _GROUPS[key]
      parts = fields.of(kind)
      made |= {name: _field(parts[k], kind, name) for k, name in names.items()}
    elif key not in _RECIPE:
      made[key] = _field(found[key], rule.factory, key)
  if rule.matrices:
    made |= _fallback()
  return {
    key: field._replace(remark=_remark(key, rule) or field.remark)
    for key, field in made.items()
    if key not in rule.hidden
  }


def check_name(name: str) -> str:
  """`name`, where it is that of a rule.

  Raises:
    ValueError: it is none.
  """
  if name not in RULES:
    raise ValueError(
      f"optim.name must be one of {', '.join(RULES)}; got {name!r}"
    )
  return name


def chosen(group: Mapping[str, Any]) -> dict[str, Any]:
  """The group `optim` without the groups of rules that are not chosen.

  Args:
    group: its fields, and mappings of the fields of rules.

  Raises:
    ValueError: a value in them is not the default: nothing would read it.
  """
  name = check_name(group.get("name", DEFAULT))
  for other in set(RULES) - {name}:
    known = options(other)
    for key, value in (group.get(other) or {}).items():
      if key not in known or value != known[key].default:
        raise ValueError(
          f"nothing reads optim.{other}.{key}={value!r}: the rule is "
          f"optim.name={name!r}; set optim.name={other}, or leave it"
        )
  return {k: v for k, v in group.items() if k == name or k not in RULES}


def build(
  name: str,
  values: Mapping[str, Any],
  rate: optax.Schedule,
  peak: float,
  *,
  weight_decay: float,
  mask: Any,
  dims: Any,
) -> optax.GradientTransformation:
  """The transformation of a rule.

  Args:
    name: a key of `RULES`.
    values: all fields of `options`, as `filled` gives them.
    rate: step -> learning rate.
    peak: of `rate`, for a fallback with a peak of its own.
    weight_decay: decoupled, times the learning rate.
    mask: what decays.
    dims: which leaves are matrices.
  """
  rule = RULES[name]
  decay = {"weight_decay": weight_decay, "mask": mask}
  known = inspect.signature(rule.factory).parameters
  given = {k: v for k, v in _arguments(name, values).items() if k in known}
  if "dims" in known:
    given["dims"] = dims
  if rule.matrices:
    own = values[f"{_FALLBACK}learning_rate"]
    factor = own / peak if own and peak else 1.0
    other = rate if factor == 1 else lambda count: factor * rate(count)
    adam = {k: values[_FALLBACK + k] for k in ("b1", "b2", "eps")}
    given["fallback"] = adamw(other, **adam, **decay)
  return rule.factory(rate, **decay, **given)


def filled(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """What is said of the group `optim.<name>`, and the defaults of the rest.

  Raises:
    ValueError: a field that the rule does not have or, with what else is said,
      does not read, or a value that its field does not take.
  """
  known = options(name)
  for key, value in values.items():
    if key not in known:
      raise ValueError(
        f"optim.{name} has no field {key}; it has {', '.join(known)}"
      )
    fields.check_value(f"optim.{name}.{key}", known[key], value)
  made = {key: values.get(key, field.default) for key, field in known.items()}
  for (rule, switch, value), unread in _UNREAD.items():
    if rule != name or made[switch] != value:
      continue
    for key in unread:
      if made[key] != known[key].default:
        raise ValueError(
          f"optim.{name}.{key}={made[key]!r} is not read with optim.{name}."
          f"{switch}={value}; leave it, or choose another {switch}"
        )
  return made


def upgraded(group: Mapping[str, Any]) -> dict[str, Any]:
  """The group `optim` of an earlier run, in the fields of today.

  Its b1, b2 and eps were AdamW's alone: where that was the rule, or served
  what was no matrix.
  """
  old = ("b1", "b2", "eps")
  name = group.get("name", DEFAULT)
  if not set(old) & set(group) or name not in RULES:
    return dict(group)
  rest = {k: v for k, v in group.items() if k not in old}
  prefix = _FALLBACK if RULES[name].matrices else ""
  adam = {prefix + k: group[k] for k in old if k in group}
  own = adam if prefix or name == "adamw" else {}
  made = _WAS.get(name, {}) | own | (rest.get(name) or {})
  return rest | {name: filled(name, made)}


# Defaults that those runs had, where they are others today.
_WAS = {"m3": {"b1": 0.95}, "muon": {"b1": 0.95}}


def _field(field: Field, factory: Callable[..., Any], key: str) -> Field:
  """A parameter of a factory as the field `key` of a config."""
  default = field.default
  hint = _hints(factory)[field.name]
  names = _literals(hint)
  bounds: Any
  if key.endswith("_dtype"):
    bounds = _DTYPES
  elif key in _NAMES:
    bounds = _NAMES[key]
  elif names:
    bounds = OneOf(*names)
  else:
    wide = _BOUNDS.get(key, fields.AT_LEAST_0)
    whole = f"{factory.__name__}.{key}"
    bounds = field.bounds or _BOUNDS.get(whole, wide)
  if default is None:
    default = NONE if isinstance(bounds, OneOf) else 0.0
  return field._replace(name=key, default=default, bounds=bounds, group=None)


def _fallback() -> dict[str, Field]:
  """The fields of AdamW for what is not a matrix."""
  found = fields.of(adamw)
  rate = Field(
    "", 0.0, fields.AT_LEAST_0, False, None, "learning rate; 0 is the same."
  )
  known = {"learning_rate": rate} | {k: found[k] for k in ("b1", "b2", "eps")}
  said = "AdamW's, for what is not a matrix: "
  return {
    _FALLBACK + k: x._replace(name=_FALLBACK + k, remark=said + x.remark)
    for k, x in known.items()
  }


_hints = functools.cache(typing.get_type_hints)


def _literals(hint: Any) -> list[str]:
  """The names that an annotation allows; "none" where it allows None."""
  parts = typing.get_args(hint) if _is_union(hint) else (hint,)
  names = [
    name
    for part in parts
    if typing.get_origin(part) is typing.Literal
    for name in typing.get_args(part)
  ]
  return [*names, NONE] if names and type(None) in parts else names


def _is_union(hint: Any) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _memory() -> dict[str, Field]:
  """The fields of a memory of gradients, beside those of its rule."""
  kind = Field(
    "memory", "mlp", OneOf("mlp", "linear"), False, None,
    "an MLP for each matrix, or a matrix.",
  )  # fmt: skip
  found = fields.of(optim.MLPMemory)
  bounds = {
    "hidden": fields.AT_LEAST_0,
    "depth": Whole(1, 2),
    "activation": OneOf("silu", "gelu", "relu", "tanh"),
    "residual": found["residual"].bounds,
    "seed": fields.SEED,
  }
  made = {key: found[key]._replace(bounds=x) for key, x in bounds.items()}
  remark = "width over the fan-in (then at least 4); above 1, hidden units."
  made["hidden"] = made["hidden"]._replace(remark=remark)
  return {"memory": kind, **made}


def _remark(key: str, rule: Rule) -> str:
  """What the docstrings say of an option."""
  for source in (rule.factory, *rule.about):
    field = fields.of(source).get(key)
    if field and field.remark and "see `" not in field.remark:
      return field.remark
  return ""


def _arguments(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """The values as the factory takes them."""
  parameters = inspect.signature(RULES[name].factory).parameters
  given = dict(values)
  for key, value in values.items():
    if key == "memory":
      given[key] = _memory_of(values)
    elif key == "preconditioner":
      make: Any = _PRECONDITIONERS.get(value)
      given[key] = make() if make else None
    elif key.endswith("_dtype"):
      given[key] = None if value == NONE else jnp.dtype(value)
    elif value == NONE or not _is_said(key, value, parameters):
      given[key] = None
  for group, (kind, names) in _GROUPS.items():
    if group in parameters:
      said = {k: given.pop(x) for k, x in names.items() if x in given}
      given[group] = kind(**said)
  return given


def _is_said(
  key: str, value: Any, parameters: Mapping[str, inspect.Parameter]
) -> bool:
  """Whether a number stands for itself, and not for None."""
  if key not in parameters or isinstance(value, (bool, str)) or value:
    return True
  hint = parameters[key].annotation
  return type(None) not in typing.get_args(hint)


def _memory_of(values: Mapping[str, Any]) -> Any:
  if values["memory"] == "linear":
    return optim.LinearMemory()
  hidden = values["hidden"]
  return optim.MLPMemory(
    int(hidden) if hidden > 1 else hidden, values["depth"],
    values["activation"], values["residual"], values["seed"],
  )  # fmt: skip
