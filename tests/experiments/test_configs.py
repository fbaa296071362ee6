"""Configs: found by name, valid, of the promised size; mistakes answered."""

import pathlib
import re
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags

from experiments.cli import named
from nl_jax import build, sharding
from nl_jax.models import presets

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results.md"
TABLE = ROOT / "nl_jax" / "eval" / "table1.csv"  # Of the paper.
NAMES = named.config_names()
ARCHS = (
  "hope", "hope_linear", "hope_attention", "transformer",
  "hope_incontext", "hope_attention_incontext",
  "deltanet", "gated_deltanet", "gated_deltanet2",
  "titans_lmm", "ttt_linear", "ttt_mlp",
  "retnet", "samba", "comba", "titans_mac", "titans_mag",
  "titans_mal", "dla", "memora", "rwkv7",
)  # fmt: skip


def parse(*args):
  values = flags.FlagValues()
  # Overrides are made flags of their own from what stands in sys.argv.
  with mock.patch.object(sys, "argv", ["lm", *args]):
    named.define_config(values)
    named.parse(["lm", *args], values)
  return values.config


def mistake(*args):
  with pytest.raises(SystemExit) as stop:
    parse(*args)
  return str(stop.value)


def test_every_model_has_every_size():
  assert set(NAMES) == {
    f"{arch}_{size}"
    for arch in ARCHS
    for size in presets.SCALES
    if size != "smoke"
  }


@pytest.mark.parametrize(
  "name", NAMES + [f"{arch}_tiny:smoke" for arch in ARCHS]
)
def test_a_config_builds_and_its_count_is_the_formula(name):
  config = build.resolve(named.load_config(name))
  net = build.model(config)
  build.make_optimizer(config, net)
  build.options(config)
  params = jax.eval_shape(net.init, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == net.parameter_count()
  tokens = jax.ShapeDtypeStruct((1, 2 * net.alignment), np.int32)
  logits, _, _ = jax.eval_shape(net.apply, params, tokens)
  assert logits.shape == (*tokens.shape, net.vocab_size)
  assert build.from_plain(build.plain(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_the_test_size_is_one(name):
  arch = name.rpartition("_")[0]
  tiny = named.load_config(f"{arch}_tiny:smoke")
  assert named.load_config(f"{name}:smoke") == tiny


@pytest.mark.parametrize("size", ["tiny", "340m", "760m", "1b3"])
def test_models_of_a_scale_are_parameter_matched(size):
  counts = [
    build.model(build.resolve(named.load_config(f"{a}_{size}")))
    .parameter_count()
    for a in ARCHS
  ]  # fmt: skip
  paper = named.load_config(f"hope_{size}:paper")
  counts.append(build.model(build.resolve(paper)).parameter_count())
  assert max(counts) / min(counts) < 1.035
  nominal = presets.SCALES[size].parameters
  for count in counts:
    assert not nominal or abs(count / nominal - 1) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_the_library_makes_the_model_of_a_config_by_name(name):
  assert build.model(name) == build.model(
    build.resolve(named.load_config(name))
  )


@pytest.mark.parametrize("name", ["hope_1b3:smoke", "hope_340m:paper"])
def test_the_library_knows_the_words_of_a_name(name):
  assert build.model(name) == build.model(
    build.resolve(named.load_config(name))
  )
  with pytest.raises(ValueError, match="Did you mean hope_1b3"):
    build.model("hope_1b")
  with pytest.raises(ValueError, match="'papr'; known: smoke, paper"):
    build.model("hope_1b3:papr")


@pytest.mark.parametrize("family", ARCHS)
def test_a_docstring_says_what_a_user_asks(family):
  text = (named._FOLDER / f"{family}.py").read_text()
  for line in ("Unstated in the paper:", "Measured (docs/results.md):",
               f"python -m experiments.lm --config={family}_tiny"):  # fmt: skip
    assert line in text, line
  row = re.search(rf"^\| `{family}_tiny` .*$", RESULTS.read_text(), re.M)
  if row:
    measured = re.search(r"tiny: (\S+ ± \S+) nat per byte, (\d) seeds", text)
    cells = [cell.strip() for cell in row[0].split("|")]
    assert cells[4] == measured[1] and cells[6] == measured[2]
  else:
    assert "tiny: not run" in text
  papers = TABLE.read_text().splitlines()
  for values in re.findall(r"^  \w+: ([\d.]+), ([\d.]+)\.$", text, re.M):
    assert any({*values} <= {*row.split(",")} for row in papers), values


def test_overrides_have_the_fields_type():
  config = parse(
    "--config=hope_tiny", "--config.train.steps=7",
    "--config.model.cms.periods=2048,4096,8192",
  )  # fmt: skip
  assert config.train.steps == 7
  assert config.model.cms.periods == (2048, 4096, 8192)


@pytest.mark.parametrize("args,sentence", [
  (["--config=hope_1b"], "Did you mean hope_1b3"),
  ([], "--config is required"),
  (["--config=hope_tiny:tiny"], "unknown config argument 'tiny'"),
  (["--config=nowhere.py"], "no config file 'nowhere.py'"),
  (["--config=hope_tiny", "--config.optim.lr=1"], "learning_rate"),
  (["--config=hope_tiny", "--config.train.steps=many"], "invalid literal"),
  (["--config=hope_tiny", "--config.train=3"], "is a group"),
  (["hope_tiny"], "--config"),
])  # fmt: skip
def test_mistakes_are_one_sentence(args, sentence):
  text = mistake(*args)
  assert sentence in text and "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize("change,sentence", [
  ("--config.model.heads=3", "model.heads \\* model.head_dim"),
  ("--config.model.cms.periods=2048,3000,9000", "each a multiple"),
  ("--config.model.mixer.chunk_gen=24", "alignment|multiple"),
  ("--config.data.batch_size=7", "period|multiple"),
  ("--config.model.vocab_size=200", "vocab_size"),
  ("--config.data.source=text", "needs data.path"),
  ("--config.data.tokenizer=byte", "bytes"),
  ("--config.model.mixer.objective=l3", "model.mixer.objective must be one of"),
  ("--config.model.arch=hop", "Did you mean 'hope'"),
  ("--config.optim.name=adam", "adamw"),
  ("--config.train.steps=0", "train.steps"),
  ("--config.mesh.tensor=3", "mesh"),
  ("--config.eval.tasks=pica", "eval.tasks: no task 'pica'"),
  ("--config.eval.batches=-1", "eval.batches"),
])  # fmt: skip
def test_what_does_not_fit_is_found_before_a_compile(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    config = build.resolve(parse("--config=hope_tiny", change))
    net = build.model(config)
    build.make_optimizer(config, net)
    build.options(config)
    build.mesh(config)
    build.dataset(config, net)


@pytest.mark.parametrize("devices,given,expected", [
  (256, {}, (1, 128, 1, 2)),
  (64, {}, (1, 64, 1, 1)),
  (512, dict(replica=2), (2, 64, 1, 4)),
  (256, dict(tensor=4), (1, -1, 1, 4)),
  (256, dict(sequence=2), (1, -1, 2, 1)),
  (256, dict(fsdp=32, tensor=8), (1, 32, 1, 8)),
  (64, dict(replica=3), (3, -1, 1, 1)),
  (64, dict(replica=-1), (-1, -1, 1, 1)),
])  # fmt: skip
def test_the_mesh_takes_what_the_batch_fills(devices, given, expected):
  config = build.resolve(named.load_config("hope_1b3"))
  with config.unlocked():
    config.mesh.update(given)
  sizes = build.mesh_sizes(config, devices)
  assert tuple(sizes[axis] for axis in sharding.AXES) == expected


@pytest.mark.parametrize("sizes,sentence", [
  (dict(fsdp=3), "as many places as there are devices"),
  (dict(fsdp=1, tensor=8), "model.heads must be a multiple of mesh.tensor"),
  (dict(fsdp=8), "data.batch_size must be a multiple"),
  (dict(fsdp=1, sequence=8), "whole chunks of 8 tokens .walk smt_mlp., got "
   "data.sequence_length=96; nearest: data.sequence_length=64 or 128, or "
   "mesh.sequence=1, 2, 3, 4, 6"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit(sizes, sentence):
  config = build.resolve(named.load_config("hope_tiny:smoke"))
  with config.unlocked():
    config.data.batch_size, config.data.sequence_length = 12, 96
    config.mesh.update(sizes)
  with pytest.raises(ValueError, match=sentence):
    build.mesh(config)


@pytest.mark.parametrize("body,sentence", [
  ("def get_config(arg=''):\n  return 1 / 0\n", ":2: ZeroDivisionError"),
  ("def get_config(arg=''):\n  return {}\n", "must return a ConfigDict"),
  ("def get_config(:\n", ":1: SyntaxError"),
  ("import nowhere\n", ":1: ModuleNotFoundError"),
  ("x = 1\n", "defines no get_config"),
])  # fmt: skip
def test_a_broken_config_file_is_one_sentence(body, sentence, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(body)
  text = mistake(f"--config={path}")
  assert sentence in text and "\n" not in text


def test_a_config_is_found_by_path():
  path = named._FOLDER / "hope.py"
  smoke = parse("--config=hope_tiny:smoke")
  assert parse(f"--config={path}:tiny,smoke") == smoke
  assert parse(f"--config={path}") == parse("--config=hope_tiny")
  assert "unknown size '2b'" in mistake(f"--config={path}:2b")
