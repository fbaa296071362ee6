"""What all language-model configs share: scales, recipe and groups.

A family's model is that of `nl_jax.models.presets`; here are its data, its
optimizer and its training. Every field that none of them says has the default
of the dataclass or function that reads it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments.configs import _groups
from nl_jax.models import presets
from nl_jax.train import config, rules

ConfigDict = config_dict.ConfigDict


class Scale(NamedTuple):
  """How models of a size are trained (docs/mathematics.md 7.1).

  Attributes:
    batch_size: rows of a step.
    steps: updates of the run.
    warmup_steps: of linear warm-up.
    learning_rate: peak.
  """

  batch_size: int
  steps: int
  warmup_steps: int
  learning_rate: float


# Table 1: 2^19 tokens a step, 1B tokens of warm-up; peak rates of preset B
# (Atlas and Miras tables).
SCALES = {
  "smoke": Scale(8, 20, 2, 3e-3),
  "tiny": Scale(8, 300, 20, 3e-3),
  "340m": Scale(128, 28_610, 1907, 1.5e-3),
  "760m": Scale(128, 57_220, 1907, 1.25e-3),
  "1b3": Scale(128, 190_735, 1907, 7e-4),
}
# Peak rate of the other preset, that of GDN's and Titans' baselines.
PRESET_A = 4e-4


def of_family(
  name: str, arg: str, *, learning_rate: float | None = None
) -> ConfigDict:
  """The config of a family at a size.

  Args:
    name: a key of `presets.FAMILIES`.
    arg: a size and words, with commas between: "1b3", "tiny,smoke".
    learning_rate: peak at the paper's sizes; None: that of the scale.

  Raises:
    ValueError: an unknown size or word.
  """
  size, _, words = arg.partition(",")
  if size not in presets.SCALES:
    known = ", ".join(presets.SCALES)
    raise ValueError(f"unknown size {size!r} of {name}; known: {known}")
  family, size = presets.chosen(name, size, words)
  rate = None if size in ("smoke", "tiny") else learning_rate
  return language_model(size, presets.group(family, size), learning_rate=rate)


def language_model(
  size: str,
  model: Mapping[str, Any],
  *,
  learning_rate: float | None = None,
) -> ConfigDict:
  """A whole config: what is said here, and defaults where nothing is.

  Args:
    size: a key of SCALES.
    model: of the group `model` what differs from the defaults; in it `mixer`
      and `cms`, mappings of what differs there.
    learning_rate: peak; None: the scale's.
  """
  scale, shape = SCALES[size], presets.SCALES[size]
  small = size in ("smoke", "tiny")
  said = dict(model)
  mixer, levels = said.pop("mixer", {}), said.pop("cms")
  known = config.table(said["arch"], "chunks" in levels)
  of = lambda path, **says: _groups.filled(known[path], **says)
  group = of("model", **said)
  group.mixer = of("model.mixer", **mixer)
  group.cms = of("model.cms", **levels)
  optim = of(
    "optim",
    learning_rate=learning_rate or scale.learning_rate,
    warmup_steps=scale.warmup_steps,
  )
  optim.update({name: of(f"optim.{name}") for name in rules.RULES})
  return ConfigDict(
    dict(
      model=group,
      data=of(
        "data",
        source={"smoke": "synthetic", "tiny": "embedded"}.get(size, ""),
        tokenizer="bytes" if small else "",
        sequence_length=shape.sequence_length,
        batch_size=scale.batch_size,
      ),
      optim=optim,
      train=of(
        "train",
        steps=scale.steps,
        eval_every=100 if small else 1000,
        remat=shape.remat,
      ),
      checkpoint=of("checkpoint", every=_cadence(size, 10, 50, 1000)),
      mesh=of("mesh"),
      eval=of("eval", batches=_cadence(size, 2, 32, 64)),
    )
  )


def _cadence(size: str, smoke: int, tiny: int, large: int) -> int:
  return {"smoke": smoke, "tiny": tiny}.get(size, large)
