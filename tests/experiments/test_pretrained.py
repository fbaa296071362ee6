"""Pretrained models: the logits of transformers, levels of an MLP, files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stack import stacked
from nl_jax.pretrained import folders, hf_config, weights
from tests.experiments import hub


@pytest.mark.parametrize("mode", hub.LEVELS)
@pytest.mark.parametrize("family", hub.FAMILIES)
def test_logits_are_those_of_transformers(family, mode):
  group, params = hub.convert(family, mode)
  got = hub.logits(group, params, hub.tokens_of(family))
  hub.assert_close(got, hub.GOLDEN[f"{family}/logits"], 2e-6)


def test_gradients_are_those_of_transformers():
  """The mapping of weights is linear, so it maps their gradients too."""
  group, params = hub.convert("llama")
  net, tokens = hub.model_of(group), jnp.asarray(hub.tokens_of("llama"))

  def loss(params):
    logits = jax.nn.log_softmax(net.apply(params, tokens)[0][:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], 2).mean()

  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    got = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(wide))
  frozen = hub.weights("llama", "gradients")
  _, wanted = hub.convert("llama", tensors=frozen)
  jax.tree.map(lambda g, w: hub.assert_close(g, w, 1e-6), got, wanted)


def test_inplace_is_the_plain_transformer_bit_for_bit():
  group, params = hub.convert("qwen2")
  args = (group, params, hub.tokens_of("qwen2"))
  assert group["arch"] == "hope_attention"
  np.testing.assert_array_equal(
    hub.logits(*args), hub.logits(*args, arch="transformer")
  )


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_split_levels_sum_to_the_whole(family):
  """The law in float64, where nothing but the order of the sum differs."""
  group, params = hub.convert(family)
  parts, dealt = hub.convert(family, "split")
  assert parts["cms"]["widths"] == (17, 17, 16)
  assert set(dealt["blocks"]["cms"]) == {"high", "mid", "low", "mix"}
  tokens = hub.tokens_of(family)
  single = hub.logits(group, params, tokens)
  hub.assert_close(hub.logits(parts, dealt, tokens), single, 1e-6)
  with jax.enable_x64(True):
    wide = lambda p: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), p)
    whole = hub.logits(group, wide(params), tokens)
    assert whole.dtype == np.float64
    hub.assert_close(hub.logits(parts, wide(dealt), tokens), whole, 1e-13)


@pytest.mark.parametrize("mode,chunks", [("inplace", (8,)), ("split", (8, 16))])
def test_rates_of_zero_are_the_pretrained_model(mode, chunks):
  tokens, wanted = hub.tokens_of("llama"), hub.GOLDEN["llama/logits"]
  group, params = hub.convert("llama", mode)
  stacked.learn_in_context(group, params, chunks, (0.0,) * len(chunks))
  net = hub.model_of(group)
  assert net.fast_layers == 1 and net.fast_levels == hub.LEVELS[mode][:2]
  hub.assert_close(hub.logits(group, params, tokens), wanted, 2e-6)
  stacked.learn_in_context(group, params, chunks, (0.1,) * len(chunks))
  got = hub.logits(group, params, tokens)
  hub.assert_close(got[:, :8], wanted[:, :8], 2e-6)
  assert np.abs(got[:, 8] - wanted[:, 8]).max(-1).min() > 1e-3


def test_no_more_chunks_than_levels():
  with pytest.raises(ValueError, match="--chunks has 2 entries for the levels"):
    stacked.learn_in_context(*hub.convert("llama"), (8, 16), (0.1, 0.1))


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_the_frozen_logits_know_the_scaling_of_rope(kind):
  group, params = hub.convert("llama")
  assert group["mixer"]["rope_scaling"]["kind"] == "llama3"
  scaling = group["mixer"]["rope_scaling"] | {"kind": kind}
  other = group["mixer"] | {"rope_scaling": scaling}
  got = hub.logits(group, params, hub.tokens_of("llama"), mixer=other)
  assert np.max(np.abs(got - hub.GOLDEN["llama/logits"])) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_folders_of_any_dtype_and_number_of_files(tmp_path, dtype, files):
  folder = hub.write_folder(tmp_path / "hf", "qwen3", dtype=dtype, files=files)
  tensors = folders.open_folder(folder)
  assert {x.dtype for x in tensors.values()} == {dtype}
  wanted = hub.weights("qwen3")
  assert set(tensors) == set(wanted)
  for name, x in wanted.items():
    got = np.asarray(tensors[name])
    assert got.dtype == np.float32 and got.shape == tensors[name].shape
    # Frozen weights are rounded to bfloat16 already.
    rounded = x.astype(np.float16) if dtype == "float16" else x
    np.testing.assert_array_equal(got, rounded)


def test_older_and_newer_fields_say_the_same():
  for family in hub.FAMILIES:
    newer = hub.CONFIGS[family]
    older = {k: v for k, v in newer.items() if k != "rope_parameters"}
    said = dict(newer["rope_parameters"])
    older["rope_theta"] = said.pop("rope_theta")
    kind = said.pop("rope_type")
    older["rope_scaling"] = None if kind == "default" else said | {"type": kind}
    assert hf_config.group(older) == hf_config.group(newer)
  # The first Llama's config says neither.
  for key in ("rope_theta", "rope_scaling"):
    del older[key]
  switches = hf_config.group(older)["mixer"]
  assert switches["rope_theta"] == 10000
  assert switches["rope_scaling"] == {"kind": "none"}


def test_defaults_of_a_short_config():
  short = {k: hub.CONFIGS["llama"][k] for k in (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
  )}  # fmt: skip
  group = hf_config.group(short)
  assert group["head_dim"] == 8 and group["mixer"]["kv_heads"] == 4
  assert group["norm_epsilon"] == 1e-6 and group["tied"] is False
  trained = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
             "high_freq_factor": 4}  # fmt: skip
  said = {"rope_scaling": trained, "max_position_embeddings": 64}
  scaling = hf_config.group(short | said)["mixer"]["rope_scaling"]
  assert scaling["trained_length"] == 64


def test_what_old_files_hold_besides():
  tensors = hub.weights("qwen2")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
  group, params = hub.convert("qwen2", tensors=tensors)
  assert group["tied"] and "head" not in params


def test_one_layer():
  config = hub.CONFIGS["llama"] | {"num_hidden_layers": 1}
  tensors = {
    k: x for k, x in hub.weights("llama").items()
    if ".layers." not in k or ".layers.0." in k
  }  # fmt: skip
  group, params = hub.convert("llama", config=config, tensors=tensors)
  _, back = weights.revert(hub.model_of(group), params)
  jax.tree.map(np.testing.assert_array_equal, back, tensors)


@pytest.mark.parametrize("mode", hub.LEVELS)
@pytest.mark.parametrize("family", hub.FAMILIES)
def test_there_and_back(family, mode):
  group, params = hub.convert(family, mode)
  config, tensors = weights.revert(hub.model_of(group), params)
  jax.tree.map(np.testing.assert_array_equal, tensors, hub.weights(family))
  assert hf_config.group(config) == hf_config.group(hub.CONFIGS[family])


def test_a_split_that_training_moved_is_still_one_mlp():
  group, params = hub.convert("llama", "split")
  rng = np.random.default_rng(0)
  move = lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32)
  params = jax.tree.map(move, params)
  config, tensors = weights.revert(hub.model_of(group), params)
  merged = hub.convert("llama", config=config, tensors=tensors)
  tokens = hub.tokens_of("llama")
  hub.assert_close(
    hub.logits(*merged, tokens), hub.logits(group, params, tokens), 2e-6
  )


@pytest.mark.parametrize("change,words", [
  ({"norm": False}, "lack the norm or the residual"),
  ({"residual": False}, "lack the norm or the residual"),
  ({"levels": ("a", "b"), "widths": (4, 4), "periods": (0, 0)},
   "2 sequential levels are not a single MLP"),
])  # fmt: skip
def test_levels_that_are_no_mlp(change, words):
  group = hf_config.group(hub.CONFIGS["llama"])
  net = hub.model_of(group | {"cms": group["cms"] | change})
  assert words in hf_config.misfit(net)


def test_models_of_no_family():
  group = hf_config.group(hub.CONFIGS["qwen2"])
  both = group["mixer"] | {"qk_norm": True}
  assert "biases and norms" in hf_config.misfit(hub.model_of(group, mixer=both))
  assert "divide" in hf_config.misfit(hub.model_of(group, width=30))
  assert not hf_config.misfit(hub.model_of(group))
  plain = hub.model_of(group, arch="transformer", mixer=None)
  assert not hf_config.misfit(plain)
  assert hf_config.of(plain)["model_type"] == "llama"
  assert hf_config.of(plain)["num_key_value_heads"] == 4


CONFIG_MISTAKES = {
  "mistral": ("model_type must be one of llama, qwen2, qwen3; got 'mistral'",
              {"model_type": "mistral"}),
  "none": ("got None in config.json", {"model_type": None}),
  "gelu": ("hidden_act must be silu, got 'gelu'", {"hidden_act": "gelu"}),
  "switch": ("tie_word_embeddings of config.json must be true or false, got "
             "'no'", {"tie_word_embeddings": "no"}),
  "no number": ("rms_norm_eps of config.json must be a number, got nan",
                {"rms_norm_eps": float("nan")}),
  "mlp bias": ("mlp_bias of config.json is not supported, got True",
               {"mlp_bias": True}),
  "quantized": ("quantization_config of config.json is not supported",
                {"quantization_config": {"bits": 4}}),
  "window": ("sliding windows are not supported, got use_sliding_window=True",
             {"use_sliding_window": True, "sliding_window": 8,
              "max_window_layers": 1, "layer_types": None}),
  "layers": ("sliding windows are not supported",
             {"layer_types": ["full_attention", "sliding_attention"]}),
  "yarn": ("RoPE must be one of default, linear, llama3 over the full head",
           {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
  "partial": ("RoPE must be one of default", {"partial_rotary_factor": 0.5}),
  "no factor": ("factor of config.json must be a number, got None",
                {"rope_scaling": {"type": "linear"}}),
  "no object": ("RoPE of config.json must be a JSON object, got 'llama3'",
                {"rope_scaling": "llama3"}),
  "epsilon": ("rms_norm_eps of config.json must be a number, got '1e-5'",
              {"rms_norm_eps": "1e-5"}),
  "no width": ("hidden_size of config.json must be a whole number of at least "
               "1, got None", {"hidden_size": None}),
  "text": ("vocab_size of config.json must be a whole number",
           {"vocab_size": "67"}),
  "heads": ("model.mixer.kv_heads must be an integer that divides",
            {"num_key_value_heads": 3}),
  "shape": ("model.layers.0.mlp.down_proj.weight is [32, 50], expected "
            "[32, 51]", {"intermediate_size": 51}),
  "layer": ("model.layers.3.input_layernorm.weight is missing, expected [32]",
            {"num_hidden_layers": 4}),
  "tied": ("config.json says tie_word_embeddings, but lm_head.weight and "
           "model.embed_tokens.weight differ", {"tie_word_embeddings": True}),
  "bias": ("self_attn.k_proj.bias is missing, expected [16]",
           {"attention_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_config_that_is_not_supported(mistake):
  words, change = CONFIG_MISTAKES[mistake]
  config = hub.CONFIGS["llama"] | change
  with pytest.raises(ValueError) as error:
    hub.convert("llama", config=config)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_windows_that_are_not_in_use_are_none():
  switched_off = {"use_sliding_window": False, "sliding_window": 8}
  past_the_last = {"use_sliding_window": True, "sliding_window": 8,
                   "max_window_layers": 28, "layer_types": None}  # fmt: skip
  for change in (switched_off, past_the_last):
    hub.convert("qwen2", config=hub.CONFIGS["qwen2"] | change)


def test_tensors_that_the_model_does_not_have():
  tensors = hub.weights("qwen2")
  tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
  with pytest.raises(ValueError, match=r"o_proj.bias is \[32\], expected noth"):
    hub.convert("qwen2", tensors=tensors)
  with pytest.raises(ValueError, match=r"\[67, 32\]; .* and \d+ more; give a"):
    hub.convert("qwen2", tensors={})


def test_modes_and_levels():
  args = (hub.CONFIGS["llama"], hub.weights("llama"))
  with pytest.raises(ValueError, match="--mode must be one of inplace, split"):
    weights.convert(*args, "apart")
  with pytest.raises(ValueError, match="inplace cannot have 2 levels"):
    weights.convert(*args, "inplace", ("a", "b"))
  with pytest.raises(ValueError, match="split cannot have 1 levels"):
    weights.convert(*args, "split")
  with pytest.raises(
    ValueError, match="cms.widths\\[50\\] must be a whole number"
  ):
    many = tuple(f"level_{i}" for i in range(51))
    weights.convert(*args, "split", many)


def no_file(folder):
  (folder / folders.MODEL).unlink()


def eight_bits(folder):
  from safetensors import numpy as safetensors

  path = folder / folders.MODEL
  safetensors.save_file({"a": np.ones(2, np.int8)}, path)


def lost_part(folder):
  no_file(folder)
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder):
  no_file(folder)
  (folder / "model.safetensors.index.json").write_text("{}")


def same_twice(folder):
  path = folder / folders.MODEL
  for name in ("a", "b"):
    shutil.copyfile(path, folder / name)
  path.unlink()
  index = {"weight_map": {"x": "a", "y": "b"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil,words", [
  (hub.torn, "model.safetensors is not a safetensors file, or a torn one"),
  (no_file, "has no model.safetensors and no model.safetensors.index.json"),
  (eight_bits, "holds a as I8; weights must be float32, bfloat16, float16"),
  (lost_part, "lacks model-00001-of-00002.safetensors of its model.safetens"),
  (empty_index, "has no weight_map of names to files"),
  (same_twice, "both hold lm_head.weight; keep the files of one model"),
])  # fmt: skip
def test_files_that_are_not_whole(tmp_path, spoil, words):
  folder = hub.write_folder(tmp_path / "hf", "llama")
  spoil(folder)
  with pytest.raises(ValueError) as error:
    folders.open_folder(folder)
  assert words in str(error.value)
  assert "\n" not in str(error.value)
