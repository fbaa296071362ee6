"""The commands, as processes: train, resume, sample, describe, mistakes."""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

from experiments.cli import command as command_lib
from tests.experiments import forked

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("commands")  # One worker trains the runs.


def run(command, *args, cwd=ROOT):
  env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
  env["JAX_COMPILATION_CACHE_DIR"] = env["NL_TEST_CACHE"]
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{command}", *args],
    capture_output=True, text=True, cwd=cwd, env=env, timeout=300,
  )  # fmt: skip


@pytest.fixture(scope="module", params=["hope_tiny", "transformer_tiny"])
def workdir(request, tmp_path_factory):
  """A trained run at the smoke size, stopped half-way and continued."""
  folder = tmp_path_factory.mktemp(request.param)
  args = [f"--config={request.param}:smoke", f"--workdir={folder}",
          "--config.checkpoint.every=4", "--config.train.steps=8",
          "--config.train.log_every=2", "--config.eval.batches=1"]  # fmt: skip
  done = run("lm", *args)
  assert done.returncode == 0, done.stderr
  return folder, args, done


def test_training_shows_what_a_newcomer_wants(workdir):
  folder, _, done = workdir
  for text in ("--config.train.steps=8", "total: ", "component",
               "--- sample", "validation:", "experiments.sample"):  # fmt: skip
    assert text in done.stdout, text
  assert "Traceback" not in done.stderr
  for text in ("first batch: ", "its first row reads", "compiled the training",
               "memory of a step on each device", "starting from scratch",
               "checkpoint of step 4 begun in"):  # fmt: skip
    assert text in done.stderr, text
  about = json.loads((folder / "config.json").read_text())
  assert about["versions"]["jax"] and "git" in about
  assert (folder / "report.html").stat().st_size > 10_000
  assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
  lines = [
    json.loads(line)
    for line in (folder / "metrics.jsonl").read_text().splitlines()
  ]
  assert lines[-1]["step"] == 8 and "tokens" in lines[-1]
  assert any("eval/validation/nat_per_byte" in line for line in lines)
  if "hope" in str(folder):
    assert "memory/memory/inner_loss" in lines[0]
    assert "memory/generators/eta_mean" in lines[0]
  assert (folder / "results.json").is_file()
  assert (folder / "sample.txt").read_text()


def test_every_measured_name_is_in_the_guide(workdir):
  folder, _, _ = workdir
  guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  names = {name for line in lines for name in json.loads(line)}
  assert len(names) > 15
  for name in names:
    # A level stands for all: memory/<level>/x, opt/<level>/update_norm.
    general = re.sub(r"^(memory|opt)/.+/(\w+)$", r"\1/<level>/\2", name)
    assert f"`{general}`" in guide, name


def contents(folder):
  """What is in a run's folder, and its metrics."""
  names = sorted(p.name for p in folder.iterdir())
  return names, (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def later(workdir):
  """Commands after the training, and what was in the folder before them."""
  folder, args, _ = workdir
  before = contents(folder)
  sample = ["sample", f"--workdir={folder}"]
  said = [*sample, "--prompt=def ", "--tokens=20"]
  asked = {
    "again": ["lm", *args],
    "other": ["lm", *args, "--config.model.layers=1"],
    "sampled": said, "sampled again": said,
    "empty": [*sample, "--tokens=3"],
    "nowhere": ["sample", "--workdir=nowhere"], "nothing": ["sample"],
  }  # fmt: skip
  done = forked.run(list(asked.values()), folder.parent)
  return before, dict(zip(asked, done))


def test_the_same_command_again_changes_nothing(workdir, later):
  before, done = later
  assert done["again"].returncode == 0, done["again"].stderr
  assert "going on from step 8 in" in done["again"].stderr
  assert contents(workdir[0]) == before


def test_another_runs_workdir_is_refused(workdir, later):
  before, done = later
  other = done["other"]
  assert other.returncode == 1
  assert "model.layers: 2 -> 1" in other.stderr
  assert "Traceback" not in other.stderr
  assert contents(workdir[0]) == before


def test_sample_prints_text_from_the_last_checkpoint(later):
  _, done = later
  first = done["sampled"]
  assert first.returncode == 0, first.stderr
  assert first.stdout.startswith("def ") and len(first.stdout) > 5
  assert done["sampled again"].stdout == first.stdout
  assert done["empty"].returncode == 0, done["empty"].stderr


@pytest.mark.parametrize("name,sentence", [
  ("nowhere", "no folder nowhere"), ("nothing", "--workdir is required"),
])  # fmt: skip
def test_sample_answers_mistakes(later, name, sentence):
  got = later[1][name]
  assert got.returncode == 1
  assert sentence in got.stderr and "Traceback" not in got.stderr


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
  """A folder with a stranger's file, and commands that train nothing there."""
  folder = tmp_path_factory.mktemp("untrained")
  (folder / "sample.txt").write_text("precious")
  asked = [
    ["lm", "--config=hope_1b3", "--describe"],
    ["lm", "--config=hope_tinny", "--workdir=run"],
    ["lm", "--config=hope_tiny:smoke", "--config.model.heads=3",
     "--workdir=run"],
    ["lm", "--config=hope_tiny:smoke", "--config.data.source=text",
     "--config.data.path=missing.txt", "--workdir=run"],
    ["lm", "--config=hope_tiny:smoke", "--workdir=."],
    ["bench", "--suite=memory"],
  ]  # fmt: skip
  return folder, forked.run(asked, folder)


def test_they_make_nothing(untrained):
  folder, _ = untrained
  assert [p.name for p in folder.iterdir()] == ["sample.txt"]
  assert (folder / "sample.txt").read_text() == "precious"


def test_describe_prints_the_card(untrained):
  got = untrained[1][0]
  assert got.returncode == 0, got.stderr
  assert "total: 1,312,134,912 parameters" in got.stdout
  assert "self-modifying Titans" in got.stdout


@pytest.mark.parametrize("number,sentence", [
  (1, "Did you mean"), (2, "model.heads"), (3, "missing.txt"),
  (4, "sample.txt but no run"), (5, "unknown suite 'memory'"),
])  # fmt: skip
def test_mistakes_are_answered(untrained, number, sentence):
  got = untrained[1][number]
  assert got.returncode == 1
  assert sentence in got.stderr and "Traceback" not in got.stderr


def test_long_work_is_told_at_once_and_again(monkeypatch):
  said, thrice = [], threading.Event()

  def tell(text):
    said.append(text)
    if len(said) == 3:
      thrice.set()

  monkeypatch.setattr(command_lib, "tell", tell)
  monkeypatch.setattr(command_lib, "_REMIND", 0.001)
  with pytest.raises(ValueError), command_lib.busy("compiling"):
    assert said[0] == "compiling ..."
    assert thrice.wait(60)
    raise ValueError
  assert said[1] == "still compiling, for 0 min now"
  assert not any(t.name == "busy" for t in threading.enumerate())


def test_list_configs_prints_names():
  got = run("lm", "--list_configs")
  assert got.returncode == 0 and "hope_1b3" in got.stdout.split()


SWALLOWED = """
import gc, os, signal, time
from experiments.cli import command

signal.signal(signal.SIGINT, signal.default_int_handler)

def callback(phase, info):
  gc.callbacks.clear()
  os.kill(os.getpid(), signal.SIGINT)

def main():
  gc.callbacks.append(callback)
  gc.collect()
  time.sleep(20)
  return 0

command.run(main)
"""


def test_ctrl_c_is_heard_inside_pythons_own_callbacks():
  done = subprocess.run(
    [sys.executable, "-c", SWALLOWED],
    capture_output=True, text=True, cwd=ROOT, timeout=60,
  )  # fmt: skip
  assert done.returncode == 130, done.stderr
  assert done.stderr == "stopped by Ctrl-C\n"
