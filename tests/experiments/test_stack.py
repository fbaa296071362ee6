"""Pretrained models: logits of transformers, levels of an MLP, and back."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _hf_config, _pretrained, _setup, _tensors
from experiments.configs import hope_linear_tiny
from nl_jax import sharding
from nl_jax.models import cms, lm
from nl_jax.train import checkpoint, files
from tests.experiments import forked
from tests.golden import _oracle
from tests.laws.models import MODELS

FAMILIES = ("llama", "qwen2", "qwen3")
LEVELS = {"inplace": ("ffn",), "split": ("high", "mid", "low")}
GOLDEN = _oracle.load("pretrained")
CONFIGS = {f: json.loads(str(GOLDEN[f"{f}/config"])) for f in FAMILIES}


def weights(family):
  prefix = f"{family}/weights/"
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
    _tensors.write(folder / _tensors.MODEL, tensors, dtype, {"format": "pt"})
    return folder
  where = {}
  for i, part in enumerate(parts):
    name = f"model-{i + 1:05}-of-{files:05}.safetensors"
    held = {key: tensors[key] for key in part}
    _tensors.write(folder / name, held, dtype, {})
    where |= dict.fromkeys(part, name)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  return folder


def model_of(group, **changes):
  values = {**group, **changes}
  memory = lm.options(values["arch"], values["memory"])
  levels = cms.CMSConfig(**values["cms"])
  return lm.LanguageModel(
    **values | {"cms": levels, "memory": memory}, sequence_length=64
  )


def logits(group, params, tokens, **changes):
  net = model_of(group, **changes)
  return np.asarray(jax.jit(lambda p, x: net.apply(p, x)[0])(params, tokens))


def tokens_of(family):
  return GOLDEN[f"{family}/tokens"].astype(np.int32)


def convert(family, mode="inplace", config=None, tensors=None):
  return _pretrained.convert(
    CONFIGS[family] if config is None else config,
    weights(family) if tensors is None else tensors,
    mode,
    LEVELS[mode],
  )


def assert_close(got, wanted, bound):
  assert np.max(np.abs(got - wanted)) <= bound * np.max(np.abs(wanted))


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, mode):
  group, params = convert(family, mode)
  got = logits(group, params, tokens_of(family))
  assert_close(got, GOLDEN[f"{family}/logits"], 2e-6)


def test_inplace_is_the_plain_transformer_bit_for_bit():
  group, params = convert("qwen2")
  args = (group, params, tokens_of("qwen2"))
  assert group["arch"] == "hope_attention"
  np.testing.assert_array_equal(
    logits(*args), logits(*args, arch="transformer")
  )


@pytest.mark.parametrize("family", FAMILIES)
def test_split_levels_sum_to_the_whole(family):
  """The law in float64, where nothing but the order of the sum differs."""
  group, params = convert(family)
  parts, dealt = convert(family, "split")
  assert parts["cms"]["widths"] == (17, 17, 16)
  assert set(dealt["blocks"]["cms"]) == {"high", "mid", "low", "mix"}
  tokens = tokens_of(family)
  single = logits(group, params, tokens)
  assert_close(logits(parts, dealt, tokens), single, 1e-6)
  with jax.enable_x64(True):
    wide = lambda p: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), p)
    whole = logits(group, wide(params), tokens)
    assert whole.dtype == np.float64
    assert_close(logits(parts, wide(dealt), tokens), whole, 1e-13)


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_the_frozen_logits_know_the_scaling_of_rope(kind):
  group, params = convert("llama")
  assert group["memory"]["rope_scaling"]["kind"] == "llama3"
  scaling = group["memory"]["rope_scaling"] | {"kind": kind}
  other = group["memory"] | {"rope_scaling": scaling}
  got = logits(group, params, tokens_of("llama"), memory=other)
  assert np.max(np.abs(got - GOLDEN["llama/logits"])) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_folders_of_any_dtype_and_number_of_files(tmp_path, dtype, files):
  folder = write_folder(tmp_path / "hf", "qwen3", dtype=dtype, files=files)
  tensors = _tensors.open_folder(folder)
  assert {x.dtype for x in tensors.values()} == {dtype}
  wanted = weights("qwen3")
  assert set(tensors) == set(wanted)
  for name, x in wanted.items():
    got = np.asarray(tensors[name])
    assert got.dtype == np.float32 and got.shape == tensors[name].shape
    # Frozen weights are rounded to bfloat16 already.
    rounded = x.astype(np.float16) if dtype == "float16" else x
    np.testing.assert_array_equal(got, rounded)


def test_older_and_newer_fields_say_the_same():
  for family in FAMILIES:
    newer = CONFIGS[family]
    older = {k: v for k, v in newer.items() if k != "rope_parameters"}
    said = dict(newer["rope_parameters"])
    older["rope_theta"] = said.pop("rope_theta")
    kind = said.pop("rope_type")
    older["rope_scaling"] = None if kind == "default" else said | {"type": kind}
    assert _hf_config.group(older) == _hf_config.group(newer)
  # The first Llama's config says neither.
  for key in ("rope_theta", "rope_scaling"):
    del older[key]
  switches = _hf_config.group(older)["memory"]
  assert switches["rope_theta"] == 10000
  assert switches["rope_scaling"] == {"kind": "none"}


def test_defaults_of_a_short_config():
  short = {k: CONFIGS["llama"][k] for k in (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
  )}  # fmt: skip
  group = _hf_config.group(short)
  assert group["head_dim"] == 8 and group["memory"]["kv_heads"] == 4
  assert group["norm_epsilon"] == 1e-6 and group["tied"] is False
  trained = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
             "high_freq_factor": 4}  # fmt: skip
  said = {"rope_scaling": trained, "max_position_embeddings": 64}
  scaling = _hf_config.group(short | said)["memory"]["rope_scaling"]
  assert scaling["trained_length"] == 64


def test_what_old_files_hold_besides():
  tensors = weights("qwen2")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
  group, params = convert("qwen2", tensors=tensors)
  assert group["tied"] and "head" not in params


def test_one_layer():
  config = CONFIGS["llama"] | {"num_hidden_layers": 1}
  tensors = {
    k: x for k, x in weights("llama").items()
    if ".layers." not in k or ".layers.0." in k
  }  # fmt: skip
  group, params = convert("llama", config=config, tensors=tensors)
  _, back = _pretrained.revert(model_of(group), params)
  jax.tree.map(np.testing.assert_array_equal, back, tensors)


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, mode):
  group, params = convert(family, mode)
  config, tensors = _pretrained.revert(model_of(group), params)
  jax.tree.map(np.testing.assert_array_equal, tensors, weights(family))
  assert _hf_config.group(config) == _hf_config.group(CONFIGS[family])


def test_a_split_that_training_moved_is_still_one_mlp():
  group, params = convert("llama", "split")
  rng = np.random.default_rng(0)
  move = lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32)
  params = jax.tree.map(move, params)
  config, tensors = _pretrained.revert(model_of(group), params)
  merged = convert("llama", config=config, tensors=tensors)
  tokens = tokens_of("llama")
  assert_close(logits(*merged, tokens), logits(group, params, tokens), 2e-6)


@pytest.mark.parametrize("change,words", [
  ({"norm": False}, "lack the norm or the residual"),
  ({"residual": False}, "lack the norm or the residual"),
  ({"levels": ("a", "b"), "widths": (4, 4), "periods": (0, 0)},
   "2 sequential levels are no single MLP"),
])  # fmt: skip
def test_levels_that_are_no_mlp(change, words):
  group = _hf_config.group(CONFIGS["llama"])
  net = model_of(group | {"cms": group["cms"] | change})
  assert words in _hf_config.misfit(net)


def test_models_of_no_family():
  group = _hf_config.group(CONFIGS["qwen2"])
  both = group["memory"] | {"qk_norm": True}
  assert "biases and norms" in _hf_config.misfit(model_of(group, memory=both))
  assert "divide" in _hf_config.misfit(model_of(group, width=30))
  assert not _hf_config.misfit(model_of(group))
  plain = model_of(group, arch="transformer", memory=None)
  assert not _hf_config.misfit(plain)
  assert _hf_config.of(plain)["model_type"] == "llama"
  assert _hf_config.of(plain)["num_key_value_heads"] == 4


CONFIG_MISTAKES = {
  "mistral": ("model_type must be one of llama, qwen2, qwen3; got 'mistral'",
              {"model_type": "mistral"}),
  "none": ("got None in config.json", {"model_type": None}),
  "gelu": ("hidden_act must be silu, got 'gelu'", {"hidden_act": "gelu"}),
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
  "heads": ("model.memory.kv_heads must be an integer that divides",
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
  config = CONFIGS["llama"] | change
  with pytest.raises(ValueError) as error:
    convert("llama", config=config)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_windows_that_are_not_in_use_are_none():
  switched_off = {"use_sliding_window": False, "sliding_window": 8}
  past_the_last = {"use_sliding_window": True, "sliding_window": 8,
                   "max_window_layers": 28, "layer_types": None}  # fmt: skip
  for change in (switched_off, past_the_last):
    convert("qwen2", config=CONFIGS["qwen2"] | change)


def test_tensors_that_the_model_does_not_have():
  tensors = weights("qwen2")
  tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
  with pytest.raises(ValueError, match=r"o_proj.bias is \[32\], expected noth"):
    convert("qwen2", tensors=tensors)
  with pytest.raises(ValueError, match=r"\[67, 32\]; .* and \d+ more; give a"):
    convert("qwen2", tensors={})


def test_modes_and_levels():
  args = (CONFIGS["llama"], weights("llama"))
  with pytest.raises(ValueError, match="--mode must be one of inplace, split"):
    _pretrained.convert(*args, "apart")
  with pytest.raises(ValueError, match="inplace cannot have 2 levels"):
    _pretrained.convert(*args, "inplace", ("a", "b"))
  with pytest.raises(ValueError, match="split cannot have 1 levels"):
    _pretrained.convert(*args, "split")
  with pytest.raises(ValueError, match="cms.widths must be integers >= 1"):
    many = tuple(f"level_{i}" for i in range(51))
    _pretrained.convert(*args, "split", many)


def torn(folder):
  path = folder / _tensors.MODEL
  path.write_bytes(path.read_bytes()[:-3])


def no_file(folder):
  (folder / _tensors.MODEL).unlink()


def eight_bits(folder):
  from safetensors import numpy as safetensors

  path = folder / _tensors.MODEL
  safetensors.save_file({"a": np.ones(2, np.int8)}, path)


def lost_part(folder):
  no_file(folder)
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder):
  no_file(folder)
  (folder / "model.safetensors.index.json").write_text("{}")


def same_twice(folder):
  path = folder / _tensors.MODEL
  for name in ("a", "b"):
    shutil.copyfile(path, folder / name)
  path.unlink()
  index = {"weight_map": {"x": "a", "y": "b"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil,words", [
  (torn, "model.safetensors is no safetensors file, or a torn one"),
  (no_file, "has no model.safetensors and no model.safetensors.index.json"),
  (eight_bits, "holds a as I8; weights must be float32, bfloat16, float16"),
  (lost_part, "lacks model-00001-of-00002.safetensors of its model.safetens"),
  (empty_index, "has no weight_map of names to files"),
  (same_twice, "both hold lm_head.weight; keep the files of one model"),
])  # fmt: skip
def test_files_that_are_not_whole(tmp_path, spoil, words):
  folder = write_folder(tmp_path / "hf", "llama")
  spoil(folder)
  with pytest.raises(ValueError) as error:
    _tensors.open_folder(folder)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def write_tokenizer(folder):
  """Words of one letter, in the format of the hub."""
  import tokenizers

  words = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz.,"]
  vocabulary = {word: i for i, word in enumerate(words)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  made.save(str(folder / "tokenizer.json"))
  said = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
  (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_run(folder):
  """A run of a model that has no form in the format of the hub."""
  config = _setup.resolve(hope_linear_tiny.get_config("smoke"))
  params = jax.jit(_setup.model(config).init)(jax.random.key(0))
  zero = np.zeros((), np.int32)
  files.claim(folder, _setup.plain(config), "")
  with checkpoint.Checkpoints(folder) as saver:
    saver.save(0, {"params": params, "step": zero}, {}, {})


SMALL = [
  "--config.train.steps=2", "--config.eval.batches=1",
  "--config.data.path=text.txt", "--config.data.sequence_length=32",
  "--config.train.log_every=1", "--config.optim.warmup_steps=1",
  "--config.optim.learning_rate=0.01",
]  # fmt: skip
if CACHE := os.environ.get("NL_TEST_CACHE"):
  SMALL.append(f"--compilation_cache={CACHE}")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """The folder, and the commands with how each ended."""
  folder = tmp_path_factory.mktemp("stack")
  kept = {"eos_token_id": 1, "max_position_embeddings": 128}
  hf = write_folder(folder / "hf", "llama", config=kept)
  write_tokenizer(hf)
  write_folder(folder / "torn", "qwen2")
  torn(folder / "torn")
  (folder / "torn.json").mkdir()
  (folder / "torn.json" / "config.json").write_text('{"model_type"')
  (folder / "nothing").mkdir()
  write_run(folder / "h")
  (folder / "text.txt").write_text("abc, def. ghi jkl. " * 200)
  asked = [
    ["stack", "--hf=hf", "--workdir=i"],
    ["stack", "--hf=hf", "--workdir=s", "--mode=split"],
    ["sample", "--workdir=i", "--tokens=5", "--prompt=ab"],
    ["export", "--workdir=i", "--out=i.hf"],
    ["export", "--workdir=s", "--out=s.hf"],
    ["export", "--workdir=s", "--out=s.bf16", "--dtype=bfloat16"],
    ["stack", "--hf=s.hf", "--workdir=again"],
    ["lm", "--config=s/config.py", "--workdir=t", "--init_from=s",
     "--config.model.cms.periods=256,512,512", *SMALL],
    ["export", "--workdir=t", "--out=t.hf"],
    ["export", "--workdir=h", "--out=h.own"],
    # Mistakes.
    ["stack"],
    ["stack", "--hf=hf"],
    ["stack", "--hf=no", "--workdir=new"],
    ["stack", "--hf=nothing", "--workdir=new"],
    ["stack", "--hf=torn", "--workdir=new"],
    ["stack", "--hf=torn.json", "--workdir=new"],
    ["stack", "--hf=hf", "--workdir=new", "--levels=2"],
    ["stack", "--hf=hf", "--workdir=new", "--mode=apart"],
    ["stack", "--hf=hf", "--workdir=i"],
    ["lm", "--config=i/config.py", "--workdir=i", *SMALL],
    ["lm", "--config=i/config.py:smoke"],
    ["report", "--workdir=i"],
    ["read", "--workdir=i", "--text=text.txt", "--memory_out=m"],
    ["export"],
    ["export", "--workdir=i"],
    ["export", "--workdir=no", "--out=new"],
    ["export", "--workdir=nothing", "--out=new"],
    ["export", "--workdir=i", "--out=hf"],
    ["export", "--workdir=i", "--out=text.txt"],
  ]  # fmt: skip
  done = forked.run(asked, folder)
  return folder, list(zip(asked, done))


def read_back(folder):
  said = json.loads((folder / "config.json").read_text())
  return said, {
    k: np.asarray(x) for k, x in _tensors.open_folder(folder).items()
  }


def test_the_commands_work(commands):
  folder, done = commands
  right = [x for _, x in done[:WORKING]]
  assert all(x.returncode == 0 for x in right), [x.stderr for x in right]
  assert "ffn (50 units)" in right[0].stdout
  assert "high (17 units), mid (17 units), low (16 units)" in right[1].stdout
  assert right[2].stdout.startswith("ab")
  assert "no Hugging Face model: model.arch='hope'" in right[-1].stdout


@pytest.mark.parametrize("out", ["i.hf", "s.hf", "s.bf16"])
def test_exported_is_what_was_stacked(commands, out):
  folder, _ = commands
  said, tensors = read_back(folder / out)
  jax.tree.map(np.testing.assert_array_equal, tensors, weights("llama"))
  assert _hf_config.group(said) == _hf_config.group(CONFIGS["llama"])
  assert said["max_position_embeddings"] == 128
  assert said["bos_token_id"] == 1 and said["eos_token_id"] == 1
  assert said["torch_dtype"] == ("bfloat16" if out == "s.bf16" else "float32")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (folder / out / name).read_bytes() == (
      folder / "hf" / name
    ).read_bytes()
  file = folder / out / _tensors.MODEL
  assert (file.stat().st_size < 80_000) == (out == "s.bf16")


def test_a_stacked_model_is_trained_on_and_exported(commands):
  folder, _ = commands
  lines = (folder / "t" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(x)["train/loss"] for x in lines if "train/loss" in x]
  assert len(losses) == 2 and np.isfinite(losses).all()
  said, tensors = read_back(folder / "t.hf")
  before = weights("llama")
  assert said["model_type"] == "llama" and set(tensors) == set(before)
  moved = [np.abs(x - before[k]).max() for k, x in tensors.items()]
  assert 0 < max(moved) < 1


def test_other_models_are_exported_by_our_names(commands):
  folder, _ = commands
  said, tensors = read_back(folder / "h.own")
  assert said["model_type"] == "nl_jax"
  config = _setup.from_plain(said["config"])
  assert config.model.arch == "hope"
  params, _ = checkpoint.load_params(str(folder / "h"), _setup.model(config))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  wanted = {sharding.path_name(path): np.asarray(x) for path, x in leaves}
  jax.tree.map(np.testing.assert_array_equal, tensors, wanted)


WORKING = 10  # Commands; the others are mistakes.
SENTENCES = [
  "--hf is required: the folder of the pretrained model",
  "--workdir is required: the folder of the new run",
  "no folder --hf=no: give one with a config.json",
  "nothing has no config.json; give a folder with one",
  "model.safetensors is no safetensors file, or a torn one",
  "config.json is no JSON",
  "--levels belongs to --mode=split: inplace has one",
  "--mode must be one of inplace, split; got 'apart'",
  "i holds a run, and nothing is written over: give another --workdir",
  "i was trained on other data (fingerprint no data yet, now",
  "unknown config argument 'smoke'; there is none",
  "metrics.jsonl has no line yet: the run has measured nothing",
  "keeps every token that it reads",
  "--workdir is required: the folder of a trained run",
  "--out is required: the folder of the files to write",
  "no folder no: give the --workdir of a run",
  "no run in nothing: config.json is missing",
  "--out=hf is not an empty folder, and nothing is written over: give another",
  "--out=text.txt is not an empty folder",
]


@pytest.mark.parametrize("i", range(len(SENTENCES)))
def test_a_mistake_is_answered(commands, i):
  _, done = commands
  assert len(done) == WORKING + len(SENTENCES)
  command, said = done[WORKING + i]
  assert said.returncode == 1, command
  assert "Traceback" not in said.stderr
  assert SENTENCES[i] in said.stderr.strip().splitlines()[-1], said.stderr


def test_mistakes_leave_nothing(commands):
  folder, _ = commands
  assert not (folder / "new").exists() and not list(
    (folder / "nothing").iterdir()
  )
  steps = [p.name for p in (folder / "i" / "checkpoints").iterdir()]
  assert steps == ["0"]
  assert not (folder / "i" / "metrics.jsonl").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_live(tmp_path, family):
  """With transformers itself: its files in, our files back."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = write_folder(tmp_path / "frozen", family)
  config = transformers.AutoConfig.from_pretrained(folder)
  auto = transformers.AutoModelForCausalLM
  torch.manual_seed(1)
  model = auto.from_config(config, dtype=torch.float32).eval()
  model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  said, _ = read_back(tmp_path / "hf")
  stored = _tensors.open_folder(tmp_path / "hf")
  group, params = _pretrained.convert(said, stored)
  tokens = tokens_of(family)
  with torch.no_grad():
    wanted = model(torch.tensor(tokens)).logits.numpy()
  assert_close(logits(group, params, tokens), wanted, 5e-6)
  about, tensors = _pretrained.revert(model_of(group), params)
  out = tmp_path / "back"
  out.mkdir()
  _tensors.write(out / _tensors.MODEL, tensors, "float32", {"format": "pt"})
  (out / "config.json").write_text(json.dumps(about))
  again = auto.from_pretrained(out, dtype=torch.float32).eval()
  with torch.no_grad():
    got = again(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_array_equal(got, wanted)


def test_transformers_reads_what_export_wrote(commands):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder, _ = commands
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(folder / "s.hf", dtype=torch.float32).eval()
  with torch.no_grad():
    got = model(torch.tensor(tokens_of("llama"))).logits.numpy()
  assert_close(got, GOLDEN["llama/logits"], 1e-6)


def test_transformer_plus_plus_is_llama(tmp_path):
  """What is trained here is read there: the same logits, our defaults."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  net = MODELS["transformer"]()
  params = jax.jit(net.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: np.asarray(5 * x), params)
  about, tensors = _pretrained.revert(net, params)
  _tensors.write(tmp_path / _tensors.MODEL, tensors, "float32", {})
  (tmp_path / "config.json").write_text(json.dumps(about))
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
  tokens = tokens_of("llama")
  with torch.no_grad():
    got = model(torch.tensor(tokens)).logits.numpy()
  wanted = jax.jit(lambda p, x: net.apply(p, x)[0])(params, tokens)
  assert_close(got, np.asarray(wanted), 5e-6)


def test_the_frozen_numbers_are_what_the_oracle_says():
  pytest.importorskip("torch")
  script = pytest.importorskip("tests.golden.pretrained")
  for name, array in script.make().items():
    if array.dtype.kind == "f":
      np.testing.assert_allclose(array, GOLDEN[name], atol=1e-5, rtol=1e-5)
