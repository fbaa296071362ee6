"""Makes a HOPE-Attention of a pretrained Transformer (paper sec. 7.3).

    python -m experiments.stack --hf=Llama-3.2-1B --workdir=runs/llama

The folder has config.json and *.safetensors of a Llama, Qwen2 or Qwen3 model,
as the Hugging Face hub gives them. Its MLPs become the initial states of
feed-forward levels, and the logits stay what they were: --mode=inplace keeps
each MLP whole, --mode=split deals its hidden units out to --levels levels.
With --chunks=512,2048 the fast levels of the last quarter of the layers learn
in context, every so many tokens; without, levels change in training only.

The new workdir holds a checkpoint of step 0 for `sample`, `export` and
`lm --from --keep=weights`, and config.json, the config to train it with.
"""

import pathlib
import shlex
from typing import Any

from absl import flags

from experiments.cli import command

_HF = flags.DEFINE_string("hf", None, "Folder of the pretrained model.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the new run.")
_MODE = flags.DEFINE_string("mode", "inplace", "inplace or split.")
_LEVELS = flags.DEFINE_integer(
  "levels", None, "How many levels of --mode=split; default 3.", lower_bound=2
)
_CHUNKS = flags.DEFINE_list(
  "chunks", [], "Tokens between updates in context, of each fast level."
)
_RATES = flags.DEFINE_list(
  "rates", [], "Inner learning rates of these levels; default 0.1 each."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "bytes, or a path; default: that of the folder."
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_RATE = 0.1


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag, what in ((_HF, "the pretrained model"), (_WORKDIR, "the new run")):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required: the folder of {what}")
  folder, workdir = pathlib.Path(_HF.value), pathlib.Path(_WORKDIR.value)
  if not folder.is_dir():
    raise ValueError(f"no folder --hf={folder}: give one with a config.json")
  command.quiet()
  names, chunks, rates = _names(), *_learning()
  from experiments.stack import stacked
  from nl_jax import build
  from nl_jax.pretrained import folders, weights
  from nl_jax.train import checkpoint

  if checkpoint.latest_step(str(workdir)) is not None:
    raise ValueError(
      f"{workdir} holds a run, and nothing is written over: give another "
      "--workdir"
    )
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder} has no config.json; give a folder with one")
  said = folders.read_object(folder / "config.json")
  tensors = folders.open_folder(folder)
  with command.busy(f"reading the weights of {folder}"):
    group, params = weights.convert(said, tensors, _MODE.value, names)
  if chunks:
    stacked.learn_in_context(group, params, chunks, rates)
  tokenizer = _tokenizer(folder, group["vocab_size"])
  config = stacked.config(group, said, tokenizer)
  net = build.model(build.resolve(config))
  stacked.save(workdir, config, params)
  print(_summary(workdir, net, chunks))
  return command.DONE


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


def _learning() -> tuple[tuple[int, ...], tuple[float, ...]]:
  """Chunks and rates of the levels that learn in context."""
  try:
    chunks = tuple(map(int, _CHUNKS.value))
    rates = tuple(map(float, _RATES.value)) or (_RATE,) * len(chunks)
  except ValueError as error:
    raise ValueError(
      f"--chunks are whole numbers and --rates are numbers, got {error}"
    ) from error
  if len(rates) != len(chunks):
    raise ValueError(
      f"--rates must be one number for each of --chunks, got {rates} for "
      f"{chunks}"
    )
  return chunks, rates


def _tokenizer(folder: pathlib.Path, vocab_size: int) -> str:
  """What `data.tokenizer` is to be; "" where there is none."""
  from nl_jax.data import tokenizers

  paths = [folder.resolve() / name for name in _TOKENIZERS]
  found = [str(path) for path in paths if path.is_file()]
  chosen = _TOKENIZER.value or (found or [""])[0]
  if chosen:
    tokenizers.check_vocabulary(tokenizers.load(chosen), vocab_size)
  else:
    command.say(
      f"{folder} has no {' or '.join(_TOKENIZERS)}: without --tokenizer the "
      "model can neither write nor be trained"
    )
  return chosen


def _summary(workdir: pathlib.Path, net: Any, chunks: tuple[int, ...]) -> str:
  """What there is now, and what one does with it."""
  levels = ", ".join(
    f"{name} ({width} units)"
    for name, width in zip(net.cms.levels, net.cms.widths)
  )
  learning = [
    f"{name} learns in context every {chunk} tokens, in the last "
    f"{net.fast_layers} of the layers"
    for name, chunk in zip(net.cms.levels, chunks)
  ]
  run, folder = "python -m experiments.", shlex.quote(str(workdir))
  return "\n".join([
    f"{net.parameter_count():,} parameters, {net.layers} layers; levels of "
    f"each: {levels}",
    *learning,
    f"write:  {run}sample --workdir={folder} --prompt='Once'",
    f"train:  {run}lm --config={folder}/config.json --from={folder} "
    f"--keep=weights --workdir={folder}_trained --config.data.path=<text>",
    f"back:   {run}export --workdir={folder} --out=<folder>",
  ])  # fmt: skip


if __name__ == "__main__":
  command.run(main)
