"""Random and adversarial configs: each is a model, or a sentence.

A config of some family gets one to four fields changed, each to a value of its
range, to an end of it, to one beyond, or to what is no such value at all. What
is taken must build: the shapes of the parameters, their count by the formula,
the optimizer, the level card and the shapes of a forward pass.
"""

import math
import random
from collections.abc import Callable
from typing import Any

from experiments.cli import named
from experiments.fuzz import run
from nl_jax import fields
from nl_jax.train import config as configs

Case = run.Case

_WORST = (
  "", "x", "nan", "inf", "-inf", "-1", "0", "1", "True", "None", "()", "1,2",
  "('a',)", "1e400", "-0.0", "1e-320", "0x10", "1_000", "½", "\u202e", "\x00",
  "2147483648", "4294967296", "9" * 400, "9" * 5000, "[1]", "{}", "$x$", "..",
)  # fmt: skip
_SMALL = 1 << 12  # Numbers drawn from a range are mostly below.


def cases(count: int, draw: random.Random, shapes: bool) -> list[Case]:
  """Configs to try.

  Args:
    count: how many.
    draw: what decides them.
    shapes: whether parameters and a forward pass are traced for their shapes.
  """
  names = [x for x in named.config_names() if x.endswith("_tiny")]
  made = []
  for _ in range(count):
    name = draw.choice(names) + ":smoke"
    known = _fields(name, draw)
    chosen = draw.sample(sorted(known), draw.randint(1, 4))
    changes = {path: inside(known[path], draw) for path in chosen}
    if draw.random() < 0.5:
      worst = draw.choice(chosen)
      changes[worst] = value(known[worst], draw)
    made.append(_case(name, changes, shapes))
  return made


def _fields(name: str, draw: random.Random) -> dict[str, fields.Field]:
  """The fields of a config, mostly without what its rule does not read."""
  config = named.load_config(name)
  known = configs.flat(configs.table_of(config.to_dict()))
  if draw.random() < 0.1:
    return known
  rule = f"optim.{config.optim.name}."
  return {
    path: field
    for path, field in known.items()
    if path.count(".") < 2 or not path.startswith("optim.") or rule in path
  }


def _case(name: str, changes: dict[str, str], shapes: bool) -> Case:
  args = [f"--config.{path}={text}" for path, text in changes.items()]
  what = " ".join([f"lm --config={name}", *args])
  return Case("config", what, lambda: _built(name, args, shapes))


def value(field: fields.Field, draw: random.Random) -> str:
  """A value of a field as one would write it, good or bad."""
  if draw.random() < 0.4:
    return draw.choice(_WORST)
  return _joined(field, draw, lambda: _end(field.bounds, draw))


def inside(field: fields.Field, draw: random.Random) -> str:
  """A value that a field takes."""
  return _joined(field, draw, lambda: _inside(field.bounds, draw))


def _joined(
  field: fields.Field, draw: random.Random, one: Callable[[], Any]
) -> str:
  count = draw.randint(1, 3) if field.many else 1
  return ",".join(_text(one()) for _ in range(count))


def _text(x: Any) -> str:
  return x if isinstance(x, str) else repr(x)


def _inside(bounds: Any, draw: random.Random) -> Any:
  kind = type(bounds)
  if kind is fields.Whole:
    small = min(bounds.most, max(bounds.least, draw.choice((2, 8, 64, _SMALL))))
    return draw.randint(bounds.least, small)
  if kind is fields.Number:
    return draw.uniform(max(bounds.least, -1e3), min(bounds.most, 1e3))
  if kind is fields.OneOf:
    return draw.choice(bounds)
  if kind is fields.Only:
    return bounds.value
  return draw.choice((True, False))


def _end(bounds: Any, draw: random.Random) -> Any:
  """An end of a range, or what is just beyond."""
  kind = type(bounds)
  if kind is fields.Whole:
    return draw.choice(
      (bounds.least, bounds.most, bounds.least - 1, bounds.most + 1)
      + bounds.also
    )
  if kind is fields.Number:
    return draw.choice(
      (bounds.least, bounds.most, 2 * bounds.most, bounds.least - 1, 1e-30,
       math.nan, math.inf, -math.inf)
    )  # fmt: skip
  if kind in (fields.OneOf, fields.Only):
    return "nonesuch"
  return "no"


def parse(name: str, args: list[str]) -> Any:
  """The config of a command line.

  Raises:
    SystemExit: with the sentence of a mistake.
  """
  import sys

  from absl import flags

  argv = ["lm", f"--config={name}", *args]
  sys.argv = argv  # Overrides are made flags of their own from what is there.
  values = flags.FlagValues()
  named.define_config(values)
  named.parse(argv, values)
  return values.config


def _built(name: str, args: list[str], shapes: bool) -> str:
  from nl_jax import build
  from nl_jax.report import describe

  config = build.resolve(parse(name, args))
  net = build.model(config)
  optimizer = build.make_optimizer(config, net)
  build.options(config)
  card = describe.card_text(config, net, optimizer)
  if build.from_plain(build.plain(config)) != config:
    raise run.Wrong("the config changes as it is written and read")
  if shapes:
    _traced(net)
  return f"{net.parameter_count()} parameters, {len(card)} characters of card"


def _traced(net: Any) -> None:
  """Checks the shapes of the parameters, and of the logits of a call."""
  import jax
  import numpy as np

  params = jax.eval_shape(net.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  if count != net.parameter_count():
    raise run.Wrong(
      f"{count} parameters, by the formula {net.parameter_count()}"
    )
  tokens = jax.ShapeDtypeStruct((1, 2 * net.alignment), np.int32)
  logits, _, _ = jax.eval_shape(net.apply, params, tokens)
  if logits.shape != (*tokens.shape, net.vocab_size):
    raise run.Wrong(f"logits of shape {logits.shape}")
