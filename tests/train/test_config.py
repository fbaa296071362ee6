"""The table of all fields; configs of before, as they are read today."""

import copy
import dataclasses
import json
import math
import pathlib
import re

import pytest

from experiments.cli import named
from nl_jax import build, fields
from nl_jax.models import lm
from nl_jax.train import config as configs
from nl_jax.train import files

NAMES = named.config_names()
# What runs of before had where their configs listed nothing, by arch.
BEFORE = pathlib.Path(__file__).parents[1] / "fixtures" / "before.json"
ONE = [f"{name}_tiny" for name in ("hope_incontext", "titans_mac", "samba")]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_lists_every_field_of_its_arch(name):
  config = named.load_config(name)
  configs.check(config.to_dict())
  mixer = dataclasses.asdict(lm.MIXERS[config.model.arch].Options())
  assert sorted(config.model.mixer) == sorted(mixer)
  assert {"tied", "norm_epsilon"} <= {*config.model}


@pytest.mark.parametrize("arch", lm.MIXERS)
def test_every_field_has_bounds_and_a_remark(arch):
  for path, field in configs.flat(configs.table(arch, True)).items():
    assert field.bounds is not None and field.remark, path


def outside(field):
  """Values that a field does not take."""
  bounds = field.bounds
  values = [None, {}, object()]
  if isinstance(bounds, fields.Whole):
    values += [bounds.least - 1, bounds.most + 1, 1.5, True, math.nan]
    values = [x for x in values if x not in bounds.also]
  elif isinstance(bounds, fields.Number):
    values += [math.nan, math.inf, -math.inf, "1", True, 2 * bounds.most]
    values += [bounds.least - abs(bounds.least) - 1]
    values += [bounds.least] * bounds.above
    values += [bounds.most] * bounds.below
  elif isinstance(bounds, (fields.OneOf, fields.Only)):
    values += ["no such name", 7]
  else:
    values += [7]
  return [(x,) for x in values] if field.many else values


@pytest.mark.parametrize("name", [x for x in NAMES if x.endswith("_tiny")])
def test_a_value_out_of_range_is_told_by_its_whole_path(name):
  config = named.load_config(name).to_dict()
  known = configs.flat(configs.table_of(config))
  for path, field in known.items():
    *groups, key = path.split(".")
    changed = copy.deepcopy(config)
    node = changed
    for group in groups:
      node = node[group]
    for value in outside(field):
      node[key] = value
      with pytest.raises(ValueError) as error:
        configs.check(changed)
      text = str(error.value)
      assert path in text or "model.arch" in text or "nothing reads" in text
      assert "\n" not in text


@pytest.mark.parametrize("broken,sentence", [
  (None, "no group model"),
  ([], "no group model"),
  ({"model": None}, "no group model"),
  ({"model": {"arch": "hop"}}, "Did you mean 'hope'"),
  ({"model": {"arch": []}}, "model.arch must be one of"),
  ({"model": {"arch": "hope", "cms": 3}}, "model.cms"),
  ({"model": {"arch": "hope"}}, "no field model.width"),
])  # fmt: skip
def test_what_is_no_config_is_told(broken, sentence):
  with pytest.raises(ValueError, match=sentence):
    configs.check(configs.upgraded(broken))


def test_a_field_too_many_and_one_too_few():
  config = named.load_config("hope_tiny").to_dict()
  config["model"]["mixer"]["chunk_mem"] = 3
  with pytest.raises(
    ValueError, match="chunk_mem.*did you mean model.mixer.ch"
  ):
    configs.check(config)
  config = named.load_config("hope_tiny").to_dict()
  del config["model"]["width"]
  with pytest.raises(ValueError, match="no field model.width: a whole number"):
    configs.check(configs.upgraded(config))


def bare(arch):
  """A config of before with nothing in it that has a default."""
  shape = dict(width=8, layers=2, heads=2, head_dim=4, vocab_size=16)
  return {
    "model": {"arch": arch, "memory": {}, "cms": {"chunks": [64]}, **shape},
    "data": dict(source="embedded", sequence_length=8, batch_size=1),
    "optim": dict(learning_rate=0.1),
    "train": dict(steps=1),
  }


def test_configs_of_before_have_the_values_of_then():
  # A default that has changed: add what it was to `config._WAS`, and leave
  # the file as it is. A new field: its default must be what there was before.
  before = json.loads(BEFORE.read_text("utf-8"))
  made = {arch: configs.upgraded(bare(arch)) for arch in before}
  for arch, config in json.loads(json.dumps(made)).items():
    configs.check(config)
    then = dict(configs.leaves(before[arch]))
    now = dict(configs.leaves(config))
    then = {re.sub(r"^optim.(b1|b2|eps)$", r"optim.adamw.\1", k): x
            for k, x in then.items()}  # fmt: skip
    assert {path: now.get(path) for path in then} == then, arch


@pytest.mark.parametrize("name", ONE)
def test_a_run_of_before_is_the_same_run(name, tmp_path):
  config = build.resolve(named.load_config(name))
  now = build.plain(config)
  then = json.loads(json.dumps(now))
  mixer = then["model"].pop("mixer")
  mixer = {k: x for k, x in mixer.items() if k not in ("walk", "chunk")}
  if "memory" in mixer:
    mixer["arch"] = mixer.pop("memory")
  then["model"] |= {"memory": mixer}
  for key in ("tied", "norm_epsilon"):
    del then["model"][key]
  default = lm.MIXERS[config.model.arch].Options()
  if "chunk" in now["model"]["mixer"]:
    now["model"]["mixer"]["chunk"] = default.chunk
  files.write_json(
    tmp_path / "config.json", {"config": then, "fingerprint": ""}
  )
  files.claim(tmp_path, now, "")
  assert build.from_plain(files.read_about(tmp_path)["config"]) is not None


def test_words_need_no_quotes():
  config = named.load_config("hope_tiny")
  with config.unlocked():
    config.model.mixer.adaptive = ("k,v",)
    config.eval.tasks = ("piqa:2,boolq",)
  made = build.resolve(config)
  assert made.model.mixer.adaptive == ("k", "v")
  assert made.eval.tasks == ("piqa:2", "boolq")
