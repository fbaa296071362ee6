"""Makes a HOPE-Attention of a pretrained Transformer (paper sec. 7.3).

    python -m experiments.stack --hf=Llama-3.2-1B --workdir=runs/llama

The folder has config.json and *.safetensors of a Llama, Qwen2 or Qwen3 model,
as the Hugging Face hub gives them. Its MLPs become the initial states of
feed-forward levels, and the logits stay what they were: --mode=inplace keeps
each MLP whole, --mode=split deals its hidden units out to --levels levels that
are updated at different frequencies. The new workdir holds a checkpoint of
step 0 for `sample`, `export` and `lm --init_from`, and config.py, the config
to train it with.
"""

import pathlib
import pprint
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from experiments import _main

_HF = flags.DEFINE_string("hf", None, "Folder of the pretrained model.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the new run.")
_MODE = flags.DEFINE_string("mode", "inplace", "inplace or split.")
_LEVELS = flags.DEFINE_integer(
  "levels", None, "How many levels of --mode=split; default 3.", lower_bound=2
)
_CONFIG = "config.py"
_NO_DATA = "no data yet"  # In the place of the data's fingerprint.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_LONGEST = 4096  # Tokens of a row, unless the model was made for fewer.
_ROWS = 8  # Of a step.
_FILE = '''"""{title}; made by experiments.stack, yours to change."""

from ml_collections import config_dict

CONFIG = {config}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; it takes no argument."""
  if arg:
    raise ValueError(f"unknown config argument {{arg!r}}; there is none")
  return config_dict.ConfigDict(CONFIG)
'''


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag, what in ((_HF, "the pretrained model"), (_WORKDIR, "the new run")):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required: the folder of {what}")
  folder, workdir = pathlib.Path(_HF.value), pathlib.Path(_WORKDIR.value)
  if not folder.is_dir():
    raise ValueError(f"no folder --hf={folder}: give one with a config.json")
  logging.set_verbosity(logging.WARNING)
  names = _names()
  from experiments import _pretrained, _setup, _tensors
  from nl_jax.train import checkpoint

  if checkpoint.latest_step(str(workdir)) is not None:
    raise ValueError(
      f"{workdir} holds a run, and nothing is written over: give another "
      "--workdir"
    )
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder} has no config.json; give a folder with one")
  said = _tensors.read_object(folder / "config.json")
  group, params = _pretrained.convert(
    said, _tensors.open_folder(folder), _MODE.value, names
  )
  config = _config(group, said, _tokenizer(folder, group["vocab_size"]))
  net = _setup.model(_setup.resolve(config))
  title = f"{said['model_type']} of {folder.resolve().name}, {_MODE.value}"
  _save(workdir, config, params, title)
  print(_summary(workdir, net))
  return _main.DONE


def _names() -> tuple[str, ...]:
  """Of the levels, fastest first."""
  if _MODE.value != "split":
    if _LEVELS.value is not None:
      raise ValueError("--levels belongs to --mode=split: inplace has one")
    return ("ffn",)
  count = _LEVELS.value or 3
  if count == 3:
    return ("high", "mid", "low")
  return tuple(f"level_{i + 1}" for i in range(count))


def _tokenizer(folder: pathlib.Path, vocab_size: int) -> str:
  """The path of the model's tokenizer; "" where the folder has none."""
  from nl_jax.data import tokenizers

  for name in _TOKENIZERS:
    path = folder.resolve() / name
    if path.is_file():
      tokenizers.check_vocabulary(tokenizers.load(str(path)), vocab_size)
      return str(path)
  _main.say(
    f"{folder} has no {' or '.join(_TOKENIZERS)}: set data.tokenizer in "
    f"{_CONFIG} to train; sample cannot write without one"
  )
  return ""


def _config(
  group: Mapping[str, Any], said: Mapping[str, Any], tokenizer: str
) -> Any:
  """A whole config; how to train it is a start, not a finding."""
  from experiments import _hf_config
  from experiments.configs import _common

  model = _common.ConfigDict(group)
  config = _common.language_model("340m", model)
  config.model = model
  longest = _hf_config.size(said, "max_position_embeddings", _LONGEST)
  config.data.update(
    tokenizer=tokenizer,
    sequence_length=min(_LONGEST, longest),
    batch_size=_ROWS,
  )
  config.optim.update(learning_rate=1e-5, warmup_steps=100)
  config.train.steps = 1000
  levels = len(model.cms.levels)
  if levels > 1:  # Four times slower each, as of Table 1's shapes.
    step = _ROWS * config.data.sequence_length
    model.cms.periods = tuple(step * 4**i for i in range(levels))
  return config


def _save(workdir: pathlib.Path, config: Any, params: Any, title: str) -> None:
  """The workdir of a run that has made no step, without an optimizer.

  It has no place in any data, so `lm` starts from it in a workdir of its own
  (--init_from).
  """
  import numpy as np

  from experiments import _setup
  from nl_jax.train import checkpoint, environment, files

  plain = _setup.plain(_setup.resolve(config))
  values = pprint.pformat(config.to_dict(), width=80)
  zero = np.zeros((), np.int32)
  about = {
    "config": plain,
    "fingerprint": _NO_DATA,
    "processes": 1,
    "batch_size": config.data.batch_size,
    "rows_consumed": 0,
    "train_seconds": 0.0,
    **environment.describe(),
  }
  with files.lock(workdir):
    files.claim(workdir, plain, _NO_DATA)
    text = _FILE.format(title=title, config=values)
    files.replace(workdir / _CONFIG, text)
    with checkpoint.Checkpoints(workdir) as saver:
      state = {"params": params, "step": zero, "skipped": zero}
      saver.save(0, state, {}, about)
      saver.wait()


def _summary(workdir: pathlib.Path, net: Any) -> str:
  """What there is now, and what one does with it."""
  levels = ", ".join(
    f"{name} ({width} units)"
    for name, width in zip(net.cms.levels, net.cms.widths)
  )
  run = "python -m experiments."
  return "\n".join([
    f"{net.parameter_count():,} parameters, {net.layers} layers; levels of "
    f"each: {levels}",
    f"write:  {run}sample --workdir={workdir} --prompt='Once'",
    f"train:  {run}lm --config={workdir / _CONFIG} --init_from={workdir} "
    f"--workdir={workdir}_trained --config.data.path=<text>",
    f"back:   {run}export --workdir={workdir} --out=<folder>",
  ])  # fmt: skip


if __name__ == "__main__":
  _main.run(main)
