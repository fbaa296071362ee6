"""What all language-model configs share: scales, recipe and groups.

A builder gives the group `model`; `language_model` adds the others. Every
config takes the argument `smoke`, the test size, whatever its own.
"""

import dataclasses

from ml_collections import config_dict

from nl_jax.models import presets

ConfigDict = config_dict.ConfigDict


@dataclasses.dataclass(frozen=True)
class Scale:
  """A size of Table 1, or one of ours (model.md sections 7.1, 7.2 and 9).

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
    arg: what stands behind the colon: words with commas between.
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


def cms(
  levels: tuple[str, ...], widths: tuple[int, ...], periods: tuple[int, ...]
) -> ConfigDict:
  """The group `model.cms`, fastest level first."""
  return ConfigDict(
    dict(
      levels=levels,  # Names, fastest first (paper sec. 5, Fig. 5).
      widths=widths,  # Hidden units F of each level (model.md 7.2).
      periods=periods,  # Tokens between updates; 0: each step (Fig. 3).
      variant="sequential",  # Or nested, independent (eq. 70, 72, 74).
      norm=True,  # RMSNorm before each level; ours, unstated.
      residual=True,  # Each level adds to its input; ours, unstated.
    )
  )


def language_model(
  size: str, model: ConfigDict, *, learning_rate: float | None = None
) -> ConfigDict:
  """A whole config around the group `model`.

  Args:
    size: a key of SCALES.
    model: arch, heads, head_dim, cms and the switches of the mixer.
    learning_rate: peak; None: the scale's.
  """
  scale, shape = SCALES[size], presets.SCALES[size]
  demonstration = size in ("smoke", "tiny")
  source = {"smoke": "synthetic", "tiny": "embedded"}.get(size, "")
  group = ConfigDict(
    dict(
      arch=model.arch,  # Which mixer: a key of models.lm.MIXERS.
      width=shape.width,  # D (Table 1 sizes; shapes are ours, unstated).
      layers=shape.layers,  # L.
      heads=model.heads,  # H.
      head_dim=model.head_dim,  # K, key and value width of a head.
      vocab_size=shape.vocab_size,  # Entries, at least the tokenizer's.
    )
  )
  group.update({key: model[key] for key in ("mixer", "cms") if key in model})
  if demonstration and "remat_group" in group.get("mixer", {}):
    group.mixer.remat_group = 1  # All states are kept: memory is no matter.
  return ConfigDict(
    dict(
      model=group,
      data=_data(scale, source, tokenizer="bytes" if demonstration else ""),
      optim=_optim(scale, learning_rate or scale.learning_rate),
      train=_train(scale, demonstration),
      checkpoint=ConfigDict(
        dict(
          every=_cadence(size, 10, 50, 1000),  # Steps; 0: only at the end.
          keep=3,  # Newest checkpoints that stay.
          keep_period=0,  # Steps; its multiples stay too. 0: none does.
        )
      ),
      mesh=ConfigDict(
        dict(
          replica=1,  # Devices: copies of all weights (slices of a pod).
          fsdp=-1,  # Devices: weights and batch split; -1: as the batch fills.
          sequence=1,  # Devices: tokens of a row split.
          tensor=1,  # Devices: heads and hidden units split.
        )
      ),
      eval=ConfigDict(
        dict(
          batches=_cadence(size, 2, 32, 64),  # Of validation; 0: all of it.
          tasks=(),  # Names of benchmark tasks scored while training.
        )
      ),
    )
  )


def baseline(
  arch: str,
  size: str,
  shape: presets.Shape,
  memory: ConfigDict | None = None,
  *,
  learning_rate: float | None = PRESET_A,
) -> ConfigDict:
  """A whole config of a mixer with a plain feed-forward block.

  Args:
    arch: a key of models.lm.MIXERS.
    size: a key of SCALES.
    shape: heads, head width, feed-forward width.
    memory: the group `model.mixer`, of archs that have one.
    learning_rate: peak at the paper's scales; None: the scale's own.
  """
  model = ConfigDict(
    dict(
      arch=arch,
      heads=shape.heads,
      head_dim=shape.head_dim,
      cms=cms(("ffn",), shape.widths, (0,)),
    )
  )
  if memory is not None:
    model.mixer = memory
  rate = None if size in ("smoke", "tiny") else learning_rate
  return language_model(size, model, learning_rate=rate)


def _data(scale: Scale, source: str, tokenizer: str) -> ConfigDict:
  return ConfigDict(
    dict(
      source=source,  # text, jsonl, prepared, ...; empty: as path says.
      path="",  # File or folder of the source; of a mixture its parts.
      text_key="text",  # Field or column with the text, where there are many.
      bad_documents="refuse",  # Or skip: leave out what cannot be used.
      # "bytes", or the path of a SentencePiece .model or a tokenizer.json.
      tokenizer=tokenizer,
      sequence_length=scale.sequence_length,  # Tokens of a row.
      batch_size=scale.batch_size,  # Rows of a step, over all hosts.
      seed=0,  # Of the order of the rows.
    )
  )


def _optim(scale: Scale, learning_rate: float) -> ConfigDict:
  return ConfigDict(
    dict(
      name="adamw",  # A rule of train.optimizer; the paper names none.
      learning_rate=learning_rate,  # Peak; per step of the outer loop.
      warmup_steps=scale.warmup_steps,  # Steps; 1B tokens (GDN's recipe).
      weight_decay=0.1,  # Times the learning rate, on matrices (Titans).
      clip_norm=1.0,  # Global norm of the gradient (Titans); 0: off.
      min_ratio=0.1,  # Last learning rate over the peak; ours.
      b1=0.9,  # Decay of the first moment; ours.
      b2=0.95,  # Decay of the second moment; ours.
      eps=1e-8,  # Added to the root of the second moment; ours.
      reduce="mean",  # Of a slow level's gradients, or sum (literal eq. 71).
      nested_meta="none",  # Restarts of cms.variant=nested: reptile, fomaml.
      nested_rate=1.0,  # Of that, 0 to 1.
    )
  )


def _train(scale: Scale, demonstration: bool) -> ConfigDict:
  return ConfigDict(
    dict(
      steps=scale.steps,  # Updates of the run.
      log_every=10,  # Steps between lines of metrics.
      eval_every=100 if demonstration else 1000,  # Steps; 0: at the end.
      accumulate=1,  # Micro-batches of a step.
      dtype="auto",  # Activations; auto: bfloat16, on a CPU float32.
      # What the backward pass recomputes: layer, or none beyond the chunks.
      remat="none" if demonstration else "layer",
      seed=0,  # Of the initial weights.
      nan_policy="raise",  # Or "skip" the update of a non-finite step.
      max_skipped=100,  # Steps that "skip" may skip.
      profile_steps="",  # First and last step of a trace, as 10:13; or none.
    )
  )


def _cadence(size: str, smoke: int, tiny: int, large: int) -> int:
  return {"smoke": smoke, "tiny": tiny}.get(size, large)
