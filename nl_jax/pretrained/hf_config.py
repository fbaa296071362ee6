"""The config.json of Llama, Qwen2 and Qwen3, as our group `model`, and back.

What is read says the same in the older and the newer fields of transformers;
what is written are the older ones, which every version reads.
"""

import math
from collections.abc import Mapping
from typing import Any

from nl_jax.models import layers, lm
from nl_jax.models.mixers.attention import mixer as attention

Group = dict[str, Any]
LEVEL = "ffn"  # Of a CMS of one level.
_CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_THETA = 10000.0  # What transformers takes where no config says it.
# Of attention; what it may have besides is in no family.
_SWITCHES = ("kv_heads", "bias", "qk_norm", "rope_theta", "rope_scaling")
_FULL = "full_attention"
# Numbers of a scaling of RoPE: our names and theirs.
_SCALINGS = {
  "default": {},
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
  },
}
_TRAINED = "original_max_position_embeddings"


def group(config: Mapping[str, Any]) -> Group:
  """The group `model` of our config, of one level a layer.

  Args:
    config: the object of a config.json.

  Raises:
    ValueError: a part that our model does not have, or no number where one
      must be.
  """
  kind = config.get("model_type")
  if kind not in tuple(_CLASSES):  # Anything, hashable or not.
    raise ValueError(
      f"model_type must be one of {', '.join(_CLASSES)}; got {kind!r} in "
      "config.json"
    )
  _check_plain(config)
  width, heads = (
    size(config, "hidden_size"),
    size(config, "num_attention_heads"),
  )
  return {
    "arch": "hope_attention",
    "width": width,
    "layers": size(config, "num_hidden_layers"),
    "heads": heads,
    "head_dim": size(config, "head_dim", width // heads),
    "vocab_size": size(config, "vocab_size"),
    "tied": _switch(config, "tie_word_embeddings"),
    "norm_epsilon": _number(config, "rms_norm_eps", 1e-6),
    "mixer": {
      "kv_heads": size(config, "num_key_value_heads", heads),
      "bias": kind == "qwen2" or _switch(config, "attention_bias"),
      "qk_norm": kind == "qwen3",
      **_rope(config),
    },
    "cms": {
      "levels": (LEVEL,),
      "widths": (size(config, "intermediate_size"),),
      "periods": (0,),
      "variant": "sequential",
      "norm": True,
      "residual": True,
    },
  }


def size(config: Mapping[str, Any], key: str, default: int = 0) -> int:
  """A whole number of a config.json; without it the default, if there is one.

  Raises:
    ValueError: no such number, or none of at least 1.
  """
  value = config.get(key)
  value = default if value is None else value
  if type(value) is not int or value < 1:
    raise ValueError(
      f"{key} of config.json must be a whole number of at least 1, got "
      f"{config.get(key)!r}"
    )
  return value


def _number(
  config: Mapping[str, Any], key: str, default: float | None = None
) -> float:
  """A number of the config; without it the default, if there is one."""
  value: Any = config.get(key)
  value = default if value is None else value
  if type(value) not in (int, float) or not math.isfinite(value):
    raise ValueError(
      f"{key} of config.json must be a number, got {config.get(key)!r}"
    )
  return float(value)


def _switch(config: Mapping[str, Any], key: str) -> bool:
  """True or false, which it is where the config does not say."""
  value = config.get(key)
  if value not in (None, True, False):
    raise ValueError(
      f"{key} of config.json must be true or false, got {value!r}"
    )
  return bool(value)


def _check_plain(config: Mapping[str, Any]) -> None:
  """Raises ValueError for parts that our attention and MLP do not have."""
  activation = config.get("hidden_act", "silu")
  if activation not in ("silu", "swish"):
    raise ValueError(
      f"hidden_act must be silu, got {activation!r} in config.json"
    )
  for key in ("mlp_bias", "quantization_config"):
    if config.get(key):
      raise ValueError(
        f"{key} of config.json is not supported, got {config[key]!r:.60}"
      )
  if _slides(config):
    raise ValueError(
      "sliding windows are not supported, got "
      f"use_sliding_window={config.get('use_sliding_window')!r} and "
      f"layer_types={config.get('layer_types')!r:.60} in config.json"
    )


def _slides(config: Mapping[str, Any]) -> bool:
  """Whether some layer sees a window only."""
  depth = size(config, "num_hidden_layers")
  kinds = config.get("layer_types")
  if kinds:
    full = isinstance(kinds, list) and set(map(str, kinds)) == {_FULL}
    return not full
  first = config.get("max_window_layers", 28)  # The default of transformers.
  return bool(
    _switch(config, "use_sliding_window")
    and config.get("sliding_window", 4096) is not None
    and (type(first) is not int or first < depth)
  )


def _rope(config: Mapping[str, Any]) -> Group:
  """The switches of RoPE, of the older fields or the newer ones.

  Older: `rope_theta` beside `rope_scaling`; newer: `rope_parameters` with both.
  """
  said = config.get("rope_scaling") or config.get("rope_parameters") or {}
  if not isinstance(said, dict):
    raise ValueError(
      f"RoPE of config.json must be a JSON object, got {said!r:.60}"
    )
  kind = said.get("rope_type", said.get("type", "default"))
  partial = said.get(
    "partial_rotary_factor", config.get("partial_rotary_factor")
  )
  if kind not in tuple(_SCALINGS) or partial not in (None, 1):
    raise ValueError(
      f"RoPE must be one of {', '.join(_SCALINGS)} over the full head width, "
      f"got {said!r} in config.json"
    )
  theta = _number(said, "rope_theta", _number(config, "rope_theta", _THETA))
  scaling: Group = {"kind": "none" if kind == "default" else kind}
  scaling |= {ours: _number(said, key) for ours, key in _SCALINGS[kind].items()}
  if kind == "llama3":
    longest = config.get("max_position_embeddings")
    trained = said.get(_TRAINED, longest)
    scaling["trained_length"] = config.get(_TRAINED, trained)
  return {"rope_theta": theta, "rope_scaling": scaling}


def misfit(net: lm.LanguageModel) -> str:
  """Why a model has no form in the Hugging Face format; "" if it has one."""
  if net.module is not attention:
    return f"model.arch={net.arch!r} is none of {', '.join(_CLASSES)}"
  if len(net.cms.levels) > 1 and net.cms.variant != "independent":
    count, variant = len(net.cms.levels), net.cms.variant
    return f"{count} {variant} levels are not a single MLP"
  if not (net.cms.norm and net.cms.residual):
    return "its MLPs lack the norm or the residual"
  switches = attention.options(net.dims)
  known = {name: getattr(switches, name) for name in _SWITCHES}
  if attention.Options(**known) != switches:
    return f"no family has all of {switches}"
  if switches.bias and switches.qk_norm:
    return "no family has biases and norms of queries and keys"
  if net.width % net.heads:
    return f"model.heads={net.heads} does not divide model.width={net.width}"
  return ""


def of(net: lm.LanguageModel) -> dict[str, Any]:
  """The object of config.json of a model without `misfit`.

  Only what decides its numbers: not the length that it was made for.
  """
  switches = attention.options(net.dims)
  kind = "qwen3" if switches.qk_norm else "qwen2" if switches.bias else "llama"
  return {
    "architectures": [_CLASSES[kind]],
    "model_type": kind,
    "hidden_size": net.width,
    "intermediate_size": sum(net.cms.widths),
    "num_hidden_layers": net.layers,
    "num_attention_heads": net.heads,
    "num_key_value_heads": switches.kv_heads or net.heads,
    "head_dim": net.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": net.norm_epsilon,
    "vocab_size": net.vocab_size,
    "tie_word_embeddings": net.tied,
    "rope_theta": switches.rope_theta,
    "rope_scaling": _scaling(switches.rope_scaling),
  }


def _scaling(scaling: layers.RopeScaling) -> dict[str, Any] | None:
  """The field `rope_scaling`, which old and new versions read."""
  if scaling.kind == "none":
    return None
  said = {"rope_type": scaling.kind} | {
    theirs: getattr(scaling, ours)
    for ours, theirs in _SCALINGS[scaling.kind].items()
  }
  if scaling.kind == "llama3":
    said[_TRAINED] = scaling.trained_length
  return said
