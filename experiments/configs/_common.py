"""What all language-model configs share: scales, recipe and groups.

A builder says of the group `model` what differs from the defaults, which stand
in the dataclasses; `language_model` fills it and adds the other groups. Every
config takes the argument `smoke`, the test size, whatever its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from experiments.configs import _groups
from nl_jax.models import presets
from nl_jax.train import config, rules

ConfigDict = config_dict.ConfigDict


@dataclasses.dataclass(frozen=True)
class Scale:
  """A size of Table 1, or one of ours (docs/mathematics.md 7.1, 7.2 and 9).

  Attributes:
    sequence_length: tokens of a row.
    batch_size: rows of a step.
    steps: updates of the run.
    warmup_steps: of linear warm-up.
    learning_rate: peak.
    cms_periods: tokens between two updates of the levels high, mid, low.
  """

  sequence_length: int
  batch_size: int
  steps: int
  warmup_steps: int
  learning_rate: float
  cms_periods: tuple[int, int, int]


def _paper(steps: int, learning_rate: float) -> Scale:
  """A scale of Table 1: 2^19 tokens a step, 1B tokens of warm-up."""
  return Scale(
    sequence_length=4096,
    batch_size=128,
    steps=steps,
    warmup_steps=1907,
    learning_rate=learning_rate,
    cms_periods=(2**20, 2**22, 2**24),
  )


SCALES = {
  "smoke": Scale(
    sequence_length=64,
    batch_size=8,
    steps=20,
    warmup_steps=2,
    learning_rate=3e-3,
    cms_periods=(512, 2048, 8192),
  ),
  "tiny": Scale(
    sequence_length=256,
    batch_size=8,
    steps=300,
    warmup_steps=20,
    learning_rate=3e-3,
    cms_periods=(2048, 8192, 32768),
  ),
  # Peak rates of preset B (Atlas and Miras tables).
  "340m": _paper(steps=28_610, learning_rate=1.5e-3),
  "760m": _paper(steps=57_220, learning_rate=1.25e-3),
  "1b3": _paper(steps=190_735, learning_rate=7e-4),
}


# Peak rate of the other preset, that of GDN's and Titans' baselines.
PRESET_A = 4e-4


def size_of(size: str, arg: str, *, options: tuple[str, ...] = ()) -> str:
  """The scale that a config's argument asks for, the config's own or smoke.

  Args:
    size: the config's own.
    arg: what stands after the colon: words with commas between.
    options: words that the builder reads besides `smoke`.

  Raises:
    ValueError: a word that is not known.
  """
  known = ("smoke", *options)
  for word in arg.split(",") if arg else ():
    if word not in known:
      raise ValueError(
        f"unknown config argument {word!r}; known: {', '.join(known)}"
      )
  return "smoke" if "smoke" in arg.split(",") else size


def language_model(
  size: str,
  model: Mapping[str, Any],
  *,
  learning_rate: float | None = None,
) -> ConfigDict:
  """A whole config: what is said here, and defaults where nothing is.

  Args:
    size: a key of SCALES.
    model: of the group `model` what differs from the defaults and, in shape,
      from the scale; in it `mixer` and `cms`, mappings of what differs there.
    learning_rate: peak; None: the scale's.
  """
  scale, shape = SCALES[size], presets.SCALES[size]
  small = size in ("smoke", "tiny")
  said = dict(model)
  mixer, levels = said.pop("mixer", {}), said.pop("cms")
  known = config.table(said["arch"], "chunks" in levels)
  of = lambda path, **says: _groups.filled(known[path], **says)
  sizes = dict(
    width=shape.width, layers=shape.layers, vocab_size=shape.vocab_size
  )
  group = of("model", **sizes | said)
  group.mixer = of("model.mixer", **mixer)
  if small and "remat_group" in group.mixer:
    group.mixer.remat_group = 1  # All states are kept: memory does not matter.
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
        sequence_length=scale.sequence_length,
        batch_size=scale.batch_size,
      ),
      optim=optim,
      train=of(
        "train",
        steps=scale.steps,
        eval_every=100 if small else 1000,
        remat="none" if small else "layer",
      ),
      checkpoint=of("checkpoint", every=_cadence(size, 10, 50, 1000)),
      mesh=of("mesh"),
      eval=of("eval", batches=_cadence(size, 2, 32, 64)),
    )
  )


def baseline(
  arch: str,
  size: str,
  mixer: Mapping[str, Any],
  *,
  learning_rate: float | None = PRESET_A,
) -> ConfigDict:
  """A whole config of a mixer with a plain feed-forward block.

  Args:
    arch: a key of models.lm.MIXERS.
    size: a key of SCALES.
    mixer: of the group `model.mixer`, what differs from the defaults.
    learning_rate: peak at the paper's scales; None: the scale's own.
  """
  shape = presets.SHAPES[arch][size]
  model = dict(
    arch=arch,
    heads=shape.heads,
    head_dim=shape.head_dim,
    mixer=mixer,
    cms=dict(widths=shape.widths),
  )
  rate = None if size in ("smoke", "tiny") else learning_rate
  return language_model(size, model, learning_rate=rate)


def three_levels(
  size: str, shape: presets.Shape, **learning: Any
) -> dict[str, Any]:
  """Of the group `model.cms`, a continuum memory system of three levels.

  Args:
    size: a key of SCALES, which has the periods.
    shape: the levels' widths.
    learning: what else is said, of levels that learn in context.
  """
  return dict(
    levels=("high", "mid", "low"),
    widths=shape.widths,
    periods=SCALES[size].cms_periods,
    **learning,
  )


def _cadence(size: str, smoke: int, tiny: int, large: int) -> int:
  return {"smoke": smoke, "tiny": tiny}.get(size, large)
