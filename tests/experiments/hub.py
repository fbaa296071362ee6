"""Folders as the Hugging Face hub gives them, of the frozen models."""

import json

import jax
import numpy as np
from ml_collections import config_dict

from nl_jax import build
from nl_jax import tensors as sealed
from nl_jax.pretrained import folders
from nl_jax.pretrained import weights as weights_lib
from tests.golden import _oracle

FAMILIES = ("llama", "qwen2", "qwen3")
LEVELS = {"inplace": ("ffn",), "split": ("high", "mid", "low")}
GOLDEN = _oracle.load("pretrained")
CONFIGS = {f: json.loads(str(GOLDEN[f"{f}/config"])) for f in FAMILIES}


def weights(family, kind="weights"):
  prefix = f"{family}/{kind}/"
  return {
    key.removeprefix(prefix): x
    for key, x in GOLDEN.items()
    if key.startswith(prefix)
  }


def write_folder(folder, family, *, dtype="float32", files=1, config=()):
  """A folder as the hub gives it."""
  folder.mkdir(parents=True)
  said = {**CONFIGS[family], **dict(config)}
  (folder / "config.json").write_text(json.dumps(said))
  tensors = weights(family)
  names = list(tensors)
  parts = [names[i::files] for i in range(files)]
  if files == 1:
    sealed.write(folder / folders.MODEL, tensors, {"format": "pt"}, dtype)
    return folder
  where = {}
  for i, part in enumerate(parts):
    name = f"model-{i + 1:05}-of-{files:05}.safetensors"
    held = {key: tensors[key] for key in part}
    sealed.write(folder / name, held, {}, dtype)
    where |= dict.fromkeys(part, name)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  return folder


def model_of(group, **changes):
  groups = {
    "model": {**group, **changes},
    "data": {"sequence_length": 64},
    "train": {"dtype": "float32", "remat": "none"},
  }
  return build.model(config_dict.ConfigDict(groups))


def logits(group, params, tokens, **changes):
  net = model_of(group, **changes)
  return np.asarray(jax.jit(lambda p, x: net.apply(p, x)[0])(params, tokens))


def tokens_of(family):
  return GOLDEN[f"{family}/tokens"].astype(np.int32)


def convert(family, mode="inplace", config=None, tensors=None):
  return weights_lib.convert(
    CONFIGS[family] if config is None else config,
    weights(family) if tensors is None else tensors,
    mode,
    LEVELS[mode],
  )


def assert_close(got, wanted, bound):
  assert np.max(np.abs(got - wanted)) <= bound * np.max(np.abs(wanted))


def torn(folder):
  path = folder / folders.MODEL
  path.write_bytes(path.read_bytes()[:-3])
