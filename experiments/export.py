"""Writes the weights of a run as safetensors, for other programs.

    python -m experiments.export --workdir=runs/llama --out=llama_again

What fits the Hugging Face format (softmax attention, and one MLP a layer or
independent levels, which are summed into one) becomes a Llama, Qwen2 or Qwen3
with the config.json that `transformers` reads. Any other model is written by
our own names, its config in config.json. Nothing is written over.
"""

import pathlib
import shutil
from typing import Any

from absl import flags, logging

from experiments.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_OUT = flags.DEFINE_string("out", None, "The new folder.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Type of the written weights."
)
_CONFIG = "config.json"
# Files of a pretrained model that go with its tokenizer.
_BESIDE = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
)
# Fields of its config that change no logit, and that our config has not.
_KEPT = (
  "bos_token_id",
  "eos_token_id",
  "max_position_embeddings",
  "pad_token_id",
)


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag, what in ((_WORKDIR, "a trained run"), (_OUT, "the files to write")):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required: the folder of {what}")
  if not pathlib.Path(_WORKDIR.value).is_dir():
    raise ValueError(f"no folder {_WORKDIR.value}: give the --workdir of a run")
  out = pathlib.Path(_OUT.value)
  _refuse_taken(out)
  logging.set_verbosity(logging.WARNING)
  import jax
  import numpy as np

  from nl_jax import build
  from nl_jax import tensors as sealed
  from nl_jax.models.incontext import model as incontext
  from nl_jax.pretrained import folders
  from nl_jax.train import checkpoint, files

  config, net = build.of_run(_WORKDIR.value)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  params = jax.tree.map(np.asarray, params)
  base = net.base if isinstance(net, incontext.InContextModel) else net
  reason, about, tensors = _form(config, base, params)
  files.make_workdir(out)
  origin = {"format": "pt", "step": str(step), "workdir": _WORKDIR.value}
  sealed.write(out / folders.MODEL, tensors, origin, _DTYPE.value)
  if not reason:
    _copy_tokenizer(config, out)
  # Last: a folder with a config is whole.
  files.write_json(out / _CONFIG, about)
  if reason:
    print(f"by our own names, as no Hugging Face model: {reason}")
  elif base is not net:
    print("as it begins a text: there, no level learns in context")
  print(
    f"{about['model_type']} at step {step}: {len(tensors)} tensors in {out}"
  )
  return command.DONE


def _refuse_taken(out: pathlib.Path) -> None:
  """Raises ValueError where something is; what a killed export left is not."""
  taken = out.exists() and not out.is_dir()
  if taken or out.is_dir() and any(x.name[0] != "." for x in out.iterdir()):
    raise ValueError(
      f"--out={out} is not an empty folder, and nothing is written over: give "
      "another"
    )


def _form(
  config: Any, net: Any, params: Any
) -> tuple[str, dict[str, Any], dict[str, Any]]:
  """Why a model is not a Hugging Face one ("" if it is), config and tensors."""
  import jax

  from nl_jax import build, sharding
  from nl_jax.pretrained import hf_config, weights

  reason = hf_config.misfit(net)
  if reason:
    about = {"model_type": "nl_jax", "config": build.plain(config)}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return reason, about, {sharding.path_name(p): x for p, x in leaves}
  base = {key: x for key, x in params.items() if key != "in_context"}
  about, tensors = weights.revert(net, base)
  about["max_position_embeddings"] = config.data.sequence_length
  about["torch_dtype"] = _DTYPE.value
  return "", about | _kept(config, about["model_type"]), tensors


def _kept(config: Any, model_type: str) -> dict[str, Any]:
  """What a pretrained model says besides, in the folder of its tokenizer.

  Of another model its tokenizer's ids.
  """
  from nl_jax import build
  from nl_jax.pretrained import folders

  if not config.data.tokenizer:
    return {}
  file = pathlib.Path(config.data.tokenizer)
  beside = file.with_name(_CONFIG)
  pretrained = file.is_file() and beside.is_file()
  said = folders.read_object(beside) if pretrained else {}
  if said.get("model_type") == model_type:
    return {key: said[key] for key in _KEPT if key in said}
  tokenizer = build.tokenizer(config)
  return {
    "bos_token_id": tokenizer.begin_id,
    "eos_token_id": tokenizer.end_id,
    "pad_token_id": tokenizer.pad_id,
  }


def _copy_tokenizer(config: Any, out: pathlib.Path) -> None:
  """The files of the run's tokenizer, where it has any."""
  from nl_jax import files

  folder = pathlib.Path(config.data.tokenizer)
  for name in _BESIDE if folder.is_file() else ():
    if folder.with_name(name).is_file():
      with files.writing(out / name):
        shutil.copyfile(folder.with_name(name), out / name)


if __name__ == "__main__":
  command.run(main)
