"""Pretrained Transformers as language models of this project, and back.

Llama, Qwen2 and Qwen3 in the Hugging Face format: a config and tensors by name.
Their kernels are (d_out, d_in), ours (d_in, d_out); their RoPE pairs the same
features as ours. The feed-forward part becomes a CMS (docs/mathematics.md 4.4):

- `inplace`: every layer keeps its MLP, as a CMS of one level.
- `split`: the hidden units of each MLP are dealt out to k independent levels,
  each with a copy of the norm, mixed with weights 1. Exact, for a SwiGLU is a
  sum over its hidden units.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nl_jax import sharding
from nl_jax.models import cms, lm
from nl_jax.pretrained import hf_config as hf_config_lib

MODES = ("inplace", "split")
_LEVEL = hf_config_lib.LEVEL
_BODY = "model.layers."
# Our names of a layer's parameters, theirs after _BODY and its number.
_LAYER = {
  "mixer_norm/scale": "input_layernorm.weight",
  "mixer/w_q": "self_attn.q_proj.weight",
  "mixer/w_k": "self_attn.k_proj.weight",
  "mixer/w_v": "self_attn.v_proj.weight",
  "mixer/w_o": "self_attn.o_proj.weight",
  "mixer/b_q": "self_attn.q_proj.bias",
  "mixer/b_k": "self_attn.k_proj.bias",
  "mixer/b_v": "self_attn.v_proj.bias",
  "mixer/q_norm/scale": "self_attn.q_norm.weight",
  "mixer/k_norm/scale": "self_attn.k_norm.weight",
  f"cms/{_LEVEL}/norm/scale": "post_attention_layernorm.weight",
  f"cms/{_LEVEL}/w_gate": "mlp.gate_proj.weight",
  f"cms/{_LEVEL}/w_up": "mlp.up_proj.weight",
  f"cms/{_LEVEL}/w_down": "mlp.down_proj.weight",
}
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE = {"embed": _EMBED, "final_norm/scale": "model.norm.weight"}
_ROTARY = "rotary_emb.inv_freq"  # A table, in old files.
_SHOWN = 5  # Tensors that an error names.

Group = hf_config_lib.Group


def convert(
  hf_config: Mapping[str, Any],
  tensors: Mapping[str, Any],
  mode: str = MODES[0],
  levels: tuple[str, ...] = (_LEVEL,),
) -> tuple[Group, Any]:
  """A pretrained model as a HOPE-Attention.

  Args:
    hf_config: the object of its config.json.
    tensors: by name; anything with a shape that `np.asarray` reads.
    mode: of `MODES`.
    levels: names, fastest first; one for "inplace". Periods are 0: whoever
      trains the model decides them.

  Returns:
    The group `model` of a config, nested dicts, and the parameters in float32
    on the host.

  Raises:
    ValueError: a part that our model does not have, a missing tensor, or one
      of another shape.
  """
  if mode not in MODES:
    raise ValueError(f"--mode must be one of {', '.join(MODES)}; got {mode!r}")
  if (mode == MODES[0]) != (len(levels) == 1):
    raise ValueError(
      f"--mode={mode} cannot have {len(levels)} levels: inplace has one, split "
      "two or more"
    )
  group = hf_config_lib.group(hf_config)
  net = _net(group)
  like = jax.eval_shape(net.init, jax.random.key(0))
  _check_tensors(tensors, net.tied, like)

  def read(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    out = np.empty(x.shape, np.float32)
    for name, part in _parts(sharding.path_name(path), out):
      part[...] = _turned(name, np.asarray(tensors[name], np.float32))
    return out

  params = jax.tree_util.tree_map_with_path(read, like)
  hidden = group["cms"]["widths"][0]
  if mode == MODES[0]:
    widths: tuple[int, ...] = (hidden,)
  else:
    widths = tuple(map(len, np.array_split(np.arange(hidden), len(levels))))
    group["cms"]["variant"] = "independent"
  group["cms"] |= {
    "levels": levels,
    "widths": widths,
    "periods": (0,) * len(levels),
  }
  cms.Options(**group["cms"])  # Its sentence, before anything is written.
  params["blocks"]["cms"] = _dealt(
    params["blocks"]["cms"][_LEVEL], levels, widths
  )
  return group, params


def _dealt(
  mlp: Mapping[str, Any], levels: tuple[str, ...], widths: tuple[int, ...]
) -> dict[str, Any]:
  """The parameters of all layers' MLPs, hidden units dealt out to levels."""
  ends = np.cumsum(widths)
  dealt: dict[str, Any] = {
    name: {
      "norm": {"scale": mlp["norm"]["scale"].copy()},
      "w_gate": mlp["w_gate"][:, :, end - width : end],
      "w_up": mlp["w_up"][:, :, end - width : end],
      "w_down": mlp["w_down"][:, end - width : end],
    }
    for name, width, end in zip(levels, widths, ends)
  }
  if len(levels) > 1:
    shape = (len(mlp["w_gate"]), len(levels))
    dealt[cms.MIX] = np.ones(shape, np.float32)
  return dealt


def _turned(name: str, x: np.ndarray) -> np.ndarray:
  """Between their layout and ours; the embedding is alike in both."""
  return x.T if x.ndim == 2 and name != _EMBED else x


def _parts(ours: str, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """Their names of one of our parameters, and the view of each in ours."""
  prefix, _, rest = ours.partition("/")
  if prefix == "blocks":
    return [(f"{_BODY}{i}.{_LAYER[rest]}", part) for i, part in enumerate(x)]
  return [(_HEAD if ours == "head" else _OUTSIDE[ours], x)]


def _net(group: Group) -> lm.LanguageModel:
  """The model of a group `model`."""
  mixer = lm.options(group["arch"], group["mixer"])
  levels = cms.Options(**group["cms"])
  return lm.LanguageModel(
    **group | {"cms": levels, "mixer": mixer}, sequence_length=1
  )


def _check_tensors(tensors: Mapping[str, Any], tied: bool, like: Any) -> None:
  """Raises ValueError unless the tensors are those of the model."""
  wanted = {
    name: _turned(name, part).shape
    for path, x in jax.tree_util.tree_leaves_with_path(like)
    for name, part in _parts(sharding.path_name(path), _shape_only(x.shape))
  }
  found = {
    name: tuple(x.shape)
    for name, x in tensors.items()
    if not name.endswith(_ROTARY)
  }
  if tied and {_EMBED, _HEAD} <= {*found}:
    _check_tied(tensors)
    del found[_HEAD]
  wrong = [
    f"{name} is {_said(found.get(name), 'missing')}, expected "
    f"{_said(wanted.get(name), 'nothing')}"
    for name in sorted({*found, *wanted})
    if found.get(name) != wanted.get(name)
  ]
  if wrong:
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise ValueError(
      "the tensors are not those of the model that config.json describes: "
      f"{'; '.join(wrong[:_SHOWN])}{more}; give a whole causal language model"
    )


def _shape_only(shape: tuple[int, ...]) -> np.ndarray:
  """An array of that shape that takes no memory."""
  return np.broadcast_to(np.float32(0), shape)


def _said(shape: tuple[int, ...] | None, absent: str) -> str:
  return absent if shape is None else str(list(shape))


def _check_tied(tensors: Mapping[str, Any]) -> None:
  """A tied model may store its head, too, if it is the embedding."""
  embed, head = np.asarray(tensors[_EMBED]), np.asarray(tensors[_HEAD])
  if not np.array_equal(embed, head):
    raise ValueError(
      f"config.json says tie_word_embeddings, but {_HEAD} and {_EMBED} differ; "
      "set it to false to keep both"
    )


def revert(
  net: lm.LanguageModel, params: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `convert`, for a model without a `hf_config_lib.misfit`.

  The independent levels of a split are one MLP again: their mix weights go
  into w_down, and norms that training moved apart into w_gate and w_up.

  Args:
    net: the model.
    params: its parameters, on the host.

  Returns:
    The object of config.json, without the length that the model was made for,
    and tensors by name; views of the parameters where that is possible.
  """
  merged = _merged(params["blocks"]["cms"], net.cms)
  blocks = {**params["blocks"], "cms": {_LEVEL: merged}}
  tensors = {
    name: _turned(name, part)
    for path, x in jax.tree_util.tree_leaves_with_path(
      {**params, "blocks": blocks}
    )
    for name, part in _parts(sharding.path_name(path), np.asarray(x))
  }
  return hf_config_lib.of(net), tensors


def _merged(params: Mapping[str, Any], config: cms.Options) -> dict[str, Any]:
  """One MLP [L,...] of a level, or of levels that are summed."""
  levels = [params[name] for name in config.levels]
  if len(levels) == 1:
    return levels[0]
  scales = [np.asarray(level["norm"]["scale"]) for level in levels]
  depth = len(scales[0])
  mix = np.asarray(params.get(cms.MIX, np.ones((depth, len(levels)))))
  same = all(np.array_equal(scales[0], scale) for scale in scales)
  # Bit for bit what it was where training moved nothing.
  fold = lambda scale, w: np.asarray(w) * (1 if same else scale[:, :, None])
  whole = lambda key: np.concatenate(
    [fold(scale, level[key]) for scale, level in zip(scales, levels)], axis=2
  )
  down = [
    np.asarray(level["w_down"]) * mix[:, i, None, None].astype(np.float32)
    for i, level in enumerate(levels)
  ]
  return {
    "norm": {"scale": scales[0] if same else np.ones_like(scales[0])},
    "w_gate": whole("w_gate"),
    "w_up": whole("w_up"),
    "w_down": np.concatenate(down, axis=1),
  }
