"""A pretrained model stacked, trained on and exported, by the commands."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from experiments.cli import named
from experiments.configs import hope_linear_tiny
from nl_jax import build, sharding
from nl_jax import tensors as sealed
from nl_jax.pretrained import folders, hf_config, weights
from nl_jax.train import checkpoint, files
from tests.experiments import forked, hub
from tests.laws.models import MODELS

pytestmark = pytest.mark.xdist_group("stack")  # One worker runs the commands.


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
  config = build.resolve(hope_linear_tiny.get_config("smoke"))
  params = jax.jit(build.model(config).init)(jax.random.key(0))
  zero = np.zeros((), np.int32)
  files.claim(folder, build.plain(config), "")
  with checkpoint.Checkpoints(folder) as saver:
    saver.save(0, {"params": params, "step": zero}, {}, {})


# A name that would run as code, in Python, a shell, a format or a drawing.
STRANGE = '''h"""; open("ran", "w") #\\N{x} {0} $(touch ran) $\\frac'''
SMALL = [
  "--config.train.steps=2", "--config.eval.batches=1",
  "--config.data.path=text.txt", "--config.data.sequence_length=32",
  "--config.train.log_every=1", "--config.optim.warmup_steps=1",
  "--config.optim.learning_rate=0.01",
]  # fmt: skip
SMALL.append(f"--compilation_cache={os.environ['NL_TEST_CACHE']}")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """The folder, and the commands with how each ended."""
  folder = tmp_path_factory.mktemp("stack")
  kept = {"eos_token_id": 1, "max_position_embeddings": 128}
  hf = hub.write_folder(folder / "hf", "llama", config=kept)
  write_tokenizer(hf)
  shutil.copytree(hf, folder / STRANGE)
  hub.write_folder(folder / "torn", "qwen2")
  hub.torn(folder / "torn")
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
    ["lm", "--config=s/config.json", "--workdir=t", "--from=s",
     "--keep=weights",
     "--config.model.cms.periods=256,512,512", *SMALL],
    ["export", "--workdir=t", "--out=t.hf"],
    ["stack", f"--hf={STRANGE}", "--workdir=c", "--chunks=8,16", "--mode=split",
     "--rates=0.1,0.01"],
    ["sample", "--workdir=c", "--tokens=5", "--prompt=abcdefghij"],
    ["export", "--workdir=c", "--out=c.hf"],
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
    ["stack", "--hf=hf", "--workdir=new", "--chunks=a"],
    ["stack", "--hf=hf", "--workdir=new", "--chunks=8,16"],
    ["stack", "--hf=hf", "--workdir=new", "--chunks=8", "--rates=1,2"],
    ["stack", "--hf=hf", "--workdir=new", "--tokenizer=bytes"],
    ["stack", "--hf=hf", "--workdir=i"],
    ["lm", "--config=i/config.json", "--workdir=i", *SMALL],
    ["lm", "--config=i/config.json:smoke"],
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
    k: np.asarray(x) for k, x in folders.open_folder(folder).items()
  }


def test_the_commands_work(commands):
  folder, done = commands
  right = [x for _, x in done[:WORKING]]
  assert all(x.returncode == 0 for x in right), [x.stderr for x in right]
  assert "ffn (50 units)" in right[0].stdout
  assert "high (17 units), mid (17 units), low (16 units)" in right[1].stdout
  assert right[2].stdout.startswith("ab")
  assert "high learns in context every 8 tokens, in the last 1 of the" in (
    right[9].stdout
  )
  assert "mid learns in context every 16 tokens" in right[9].stdout
  assert right[10].stdout.startswith("abcdefghij")
  assert "there, no level learns in context" in right[11].stdout
  assert "no Hugging Face model: model.arch='hope'" in right[-1].stdout


@pytest.mark.parametrize("out", ["i.hf", "s.hf", "s.bf16", "c.hf"])
def test_exported_is_what_was_stacked(commands, out):
  folder, _ = commands
  said, tensors = read_back(folder / out)
  jax.tree.map(np.testing.assert_array_equal, tensors, hub.weights("llama"))
  assert hf_config.group(said) == hf_config.group(hub.CONFIGS["llama"])
  assert said["max_position_embeddings"] == 128
  assert said["bos_token_id"] == 1 and said["eos_token_id"] == 1
  assert said["torch_dtype"] == ("bfloat16" if out == "s.bf16" else "float32")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (folder / out / name).read_bytes() == (
      folder / "hf" / name
    ).read_bytes()
  file = folder / out / folders.MODEL
  assert (file.stat().st_size < 80_000) == (out == "s.bf16")


def test_a_stacked_model_is_trained_on_and_exported(commands):
  folder, _ = commands
  lines = (folder / "t" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(x)["train/loss"] for x in lines if "train/loss" in x]
  assert len(losses) == 2 and np.isfinite(losses).all()
  said, tensors = read_back(folder / "t.hf")
  before = hub.weights("llama")
  assert said["model_type"] == "llama" and set(tensors) == set(before)
  moved = [np.abs(x - before[k]).max() for k, x in tensors.items()]
  assert 0 < max(moved) < 1


def test_a_turned_bit_of_exported_weights_is_told(commands, tmp_path):
  folder, _ = commands
  content = bytearray((folder / "i.hf" / folders.MODEL).read_bytes())
  header = 8 + int.from_bytes(content[:8], "little")
  for place, what in ((header + 999, "is damaged: "), (header // 2, "")):
    hurt = bytearray(content)
    hurt[place] ^= 1
    (tmp_path / folders.MODEL).write_bytes(hurt)
    with pytest.raises(ValueError, match=what):
      for stored in folders.open_folder(tmp_path).values():
        np.asarray(stored)


def test_other_models_are_exported_by_our_names(commands):
  folder, _ = commands
  said, tensors = read_back(folder / "h.own")
  assert said["model_type"] == "nl_jax"
  config = build.from_plain(said["config"])
  assert config.model.arch == "hope"
  params, _ = checkpoint.load_params(str(folder / "h"), build.model(config))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  wanted = {sharding.path_name(path): np.asarray(x) for path, x in leaves}
  jax.tree.map(np.testing.assert_array_equal, tensors, wanted)


WORKING = 13  # Commands; the others are mistakes.
SENTENCES = [
  "--hf is required: the folder of the pretrained model",
  "--workdir is required: the folder of the new run",
  "no folder --hf=no: give one with a config.json",
  "nothing has no config.json; give a folder with one",
  "model.safetensors is not a safetensors file, or a torn one",
  "config.json is not JSON",
  "--levels belongs to --mode=split: inplace has one",
  "--mode must be one of inplace, split; got 'apart'",
  "--chunks are whole numbers and --rates are numbers, got invalid literal",
  "--chunks has 2 entries for the levels ffn: at most one each",
  "--rates must be one number for each of --chunks, got (1.0, 2.0) for (8,)",
  "model.vocab_size=67 is smaller than the 259 ids of data.tokenizer='bytes'",
  "i holds a run, and nothing is written over: give another --workdir",
  "i was trained on other data (fingerprint no data yet, now",
  "unknown config argument 'smoke'; i/config.json takes none",
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


def test_no_name_becomes_code(commands):
  """What a stacked run leaves is data, and nothing of a name has run."""
  folder, _ = commands
  assert not list(folder.rglob("*.py")) and not (folder / "ran").exists()
  config = named.load_config(str(folder / "c" / "config.json"))
  assert config.model.cms.chunks == (8, 16)
  assert config.data.tokenizer == str(
    (folder / STRANGE).resolve() / "tokenizer.json"
  )


def test_mistakes_leave_nothing(commands):
  folder, _ = commands
  assert not (folder / "new").exists() and not list(
    (folder / "nothing").iterdir()
  )
  steps = [p.name for p in (folder / "i" / "checkpoints").iterdir()]
  assert steps == ["0"]
  assert not (folder / "i" / "metrics.jsonl").exists()


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_live(tmp_path, family):
  """With transformers itself: its files in, our files back."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = hub.write_folder(tmp_path / "frozen", family)
  config = transformers.AutoConfig.from_pretrained(folder)
  auto = transformers.AutoModelForCausalLM
  torch.manual_seed(1)
  model = auto.from_config(config, dtype=torch.float32).eval()
  model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  said, _ = read_back(tmp_path / "hf")
  stored = folders.open_folder(tmp_path / "hf")
  group, params = weights.convert(said, stored)
  tokens = hub.tokens_of(family)
  with torch.no_grad():
    wanted = model(torch.tensor(tokens)).logits.numpy()
  hub.assert_close(hub.logits(group, params, tokens), wanted, 5e-6)
  about, tensors = weights.revert(hub.model_of(group), params)
  out = tmp_path / "back"
  out.mkdir()
  sealed.write(out / folders.MODEL, tensors, {"format": "pt"}, "float32")
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
    got = model(torch.tensor(hub.tokens_of("llama"))).logits.numpy()
  hub.assert_close(got, hub.GOLDEN["llama/logits"], 1e-6)


def test_transformer_plus_plus_is_llama(tmp_path):
  """What is trained here is read there: the same logits, our defaults."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  net = MODELS["transformer"]()
  params = jax.jit(net.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: np.asarray(5 * x), params)
  about, tensors = weights.revert(net, params)
  sealed.write(tmp_path / folders.MODEL, tensors, {}, "float32")
  (tmp_path / "config.json").write_text(json.dumps(about))
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
  tokens = hub.tokens_of("llama")
  with torch.no_grad():
    got = model(torch.tensor(tokens)).logits.numpy()
  wanted = jax.jit(lambda p, x: net.apply(p, x)[0])(params, tokens)
  hub.assert_close(got, np.asarray(wanted), 5e-6)


def test_the_frozen_numbers_are_what_the_oracle_says():
  pytest.importorskip("torch")
  script = pytest.importorskip("tests.golden.pretrained")
  for name, array in script.make().items():
    if array.dtype.kind == "f":
      np.testing.assert_allclose(array, hub.GOLDEN[name], atol=1e-5, rtol=1e-5)
