"""experiments.faults: three faults end well; the judge sees what does not."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from experiments.faults import data, judge, kinds, trials
from experiments.faults import run as faults_run
from experiments.faults import scene as scene_lib
from nl_jax import sharding
from nl_jax.train import checkpoint, files
from tests.train import stub

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("faults")  # One worker makes the trials.
CONFIG = "transformer_tiny:smoke"
THREE = [
  "--kills=3", "--only=sigkill,torn_checkpoint,full_disk",
  f"--configs={CONFIG}",
]  # fmt: skip


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "experiments.faults", *map(str, args)],
    capture_output=True, text=True, cwd=ROOT, timeout=600,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  folder = tmp_path_factory.mktemp("faults") / "all"
  return folder, command(*THREE, f"--workdir={folder}")


def test_three_faults_end_as_if_nothing_had_been(done):
  folder, first = done
  assert first.returncode == 0, first.stderr
  results = json.loads((folder / "faults.json").read_text())["trials"]
  assert [r["kind"] for r in results] == THREE[1].partition("=")[2].split(",")
  assert {r["outcome"] for r in results} <= {trials.RESUMED, trials.SENTENCE}
  assert results[0]["statuses"] == [-9, 0]
  # No more than the steps since the last whole checkpoint, and one under way.
  assert all(r["steps_lost"] <= 3 * scene_lib.EVERY for r in results)
  assert "| all | 3 |" in first.stdout and "| 0 |" in first.stdout
  names = {p.name for p in (folder / "trials").iterdir()}
  assert names == {f"{i:04d}.json" for i in range(3)}


def test_a_wrong_one_is_status_3_and_nothing_is_done_twice(done):
  folder, _ = done
  path = folder / "trials" / "0001.json"
  result = json.loads(path.read_text())
  change = {"outcome": trials.WRONG, "why": "x", "folder": "kept"}
  path.write_text(json.dumps(result | change))
  again = command(*THREE, f"--workdir={folder}")
  path.write_text(json.dumps(result))
  assert again.returncode == 3, again.stderr
  assert "wrong: kept: torn_checkpoint: x" in again.stdout
  assert "/3 " not in again.stderr
  other = command(*THREE, f"--workdir={folder}", "--seed=1")
  assert other.returncode == 1
  assert "holds other faults (seed: 0 -> 1)" in other.stderr


def test_a_run_that_loses_a_checkpoint_is_wrong(done, monkeypatch):
  folder, _ = done

  def lose(scene):
    kinds.sigkill(scene)
    # Whole when the run was killed, and not there when it resumes.
    steps = scene.workdir / "checkpoints"
    newest = checkpoint.latest_step(str(scene.workdir))
    if newest is None:
      raise scene_lib.MissedError
    (steps / str(newest)).rename(scene.workdir / "lost")
    scene.marks[-1] = scene.marks[-1]._replace(promised=newest)

  monkeypatch.setitem(kinds.KINDS, "lose", lose)
  place = trials.Place(folder, 3)
  whole = trials.whole(place, CONFIG, skipped=False)
  result = trials.run(place, trials.Trial(90, "lose", CONFIG), whole)
  assert result["outcome"] == trials.WRONG
  assert "was whole" in result["why"]
  kept = pathlib.Path(result["folder"])
  assert (kept / "run" / "metrics.jsonl").exists()
  assert (kept / "said_1.txt").read_text()


# The judge.


def train(folder: pathlib.Path, **changes) -> judge.Record:
  mesh = sharding.mesh(devices=jax.devices()[:1])
  stub.run(folder, mesh=mesh, log_every=1, **changes)
  return judge.read(folder)


class Slipped(stub.Data):
  """Data that continue one batch too late."""

  def set_state(self, state):
    super().set_state({"next_row": state["next_row"] + stub.BATCH})


def stop_at(step: int):
  def hook(index):
    if index == step:
      raise KeyboardInterrupt

  return hook


def resumed(folder: pathlib.Path, rest: stub.Data) -> judge.Record:
  with pytest.raises(KeyboardInterrupt):
    train(folder, data=stub.Data(hook=stop_at(6)))
  return train(folder, data=rest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return train(tmp_path_factory.mktemp("whole"))


def test_a_right_resume_has_no_differences(whole, tmp_path):
  assert judge.differences(whole, resumed(tmp_path, stub.Data())) == []
  assert len(whole.lines) == 10 and whole.step == 10
  assert any(name.startswith("opt/") for name in whole.leaves)


def test_a_wrong_resume_is_seen(whole, tmp_path):
  found = judge.differences(whole, resumed(tmp_path, Slipped()))
  assert found[0].startswith("the metrics of step 5: ")
  assert "train/loss" in found[0]
  assert any(x.startswith("the state's params/") for x in found)
  assert {"results", "data"} <= set(found)
  assert "more" in judge.told(found)


@pytest.mark.parametrize("change", [
  {"lines": [{"step": 1}]}, {"leaves": {}}, {"step": 9}, {"data": {}},
  {"consumed": 79}, {"results": {}},
])  # fmt: skip
def test_every_part_of_a_record_counts(whole, change):
  assert judge.differences(whole, whole._replace(**change))


def test_a_run_that_is_not_done_is_none(tmp_path):
  with pytest.raises(ValueError, match="has no finished run"):
    judge.read(tmp_path)


@pytest.mark.parametrize("said,sentence", [
  ("a log\nerror: full\n", "error: full"), ("a log\n", ""),
  ("error: one\nerror: two\n", ""), ("error: one\nmore\n", ""),
  ("Traceback (most recent call last):\nerror: one\n", ""),
])  # fmt: skip
def test_one_sentence_is_one(said, sentence):
  assert judge.sentence(said) == sentence


# What is done to runs, and what it costs.


def test_figures_of_a_resume(tmp_path):
  scene = scene_lib.Scene(
    tmp_path, tmp_path, [], scene_lib.Pace(1, 1, 1), np.random.default_rng(0)
  )
  scene.workdir.mkdir()
  lines = [
    {"step": i, "wall_time": t} for i, t in enumerate((1.0, 2.5, 7.5), 8)
  ]
  (scene.workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines) + '{"torn'
  )
  # Step 9 was made before the run ended, and saved.
  scene.marks.append(scene_lib.Mark(time=2.0, step=8, promised=4))
  said = "log\ngoing on from step 4 in x\n"
  ended = scene_lib.Ended(0, said, begun=3.0, seconds=6.0)
  expected = {"resumed_from": 4, "steps_lost": 4, "seconds_lost": 5.5}
  assert trials.lost(scene, ended) == expected
  assert scene_lib.begun_at("starting from scratch in x\n") == 0


def test_a_command_that_ends_leaves_no_process_behind(monkeypatch):
  monkeypatch.setattr(scene_lib, "_stopped", threading.Event())
  start = scene_lib.Start([], scene_lib.HEALTHY)
  scene_lib.stop()
  assert start.wait().status == -9
  start.close()
  with pytest.raises(scene_lib.StoppedError):
    scene_lib.Start([], scene_lib.HEALTHY)


_TRACE = "Traceback (most recent call last):\n  x\n"


@pytest.mark.parametrize("status,said,done,why", [
  (0, "log\n", False, ""), (1, "log\nerror: full\n", False, ""),
  (3, "", False, "ended with status 3"), (-9, "", False, "status -9"),
  (1, "log\n", False, "not with one sentence"),
  (0, "log\n" + _TRACE, False, "printed a traceback"),
  (0, "log\n" + _TRACE, True, "printed a traceback"),
  (0, "log\n" + _TRACE + "KeyboardInterrupt\n", False, "a traceback"),
  # Python's own answers: before there is a command, and after all is done.
  (0, _TRACE + "KeyboardInterrupt\n", False, ""),
  (0, "log\n" + _TRACE + "KeyboardInterrupt\n", True, ""),
])  # fmt: skip
def test_a_bad_end_is_wrong(tmp_path, status, said, done, why):
  class Start:
    def wait(self):
      return scene_lib.Ended(status, said, begun=0.0, seconds=1.0)

  scene = scene_lib.Scene(
    tmp_path, tmp_path, [], scene_lib.Pace(1, 1, 1), np.random.default_rng(0)
  )
  scene.workdir.mkdir()
  if done:
    (scene.workdir / "results.json").write_text("{}")
  if why:
    with pytest.raises(scene_lib.WrongError, match=why):
      scene.end(Start(), (0, 1))
  else:
    assert scene.end(Start(), (0, 1)).status == status
    assert scene.sentences == (["error: full"] if status else [])


def test_the_table_counts_each_outcome():
  rows = [
    {"kind": "nan", "outcome": outcome, "steps_lost": i, "seconds_lost": 2 * i}
    for i, outcome in enumerate((trials.RESUMED, trials.SENTENCE))
  ]
  rows.append({"kind": "sigkill", "outcome": trials.WRONG})
  text = trials.table(rows)
  assert "| nan | 2 | 1 | 1 | 0 | 0, 1 | 1.0, 2.0 |" in text
  assert "| sigkill | 1 | 0 | 0 | 1 | - | - |" in text
  assert "| all | 3 | 1 | 1 | 1 |" in text


@pytest.mark.parametrize("hurt", [data.lose_shard, data.garble_shard])
def test_hurt_shards_are_mended_as_they_were(tmp_path, hurt):
  read = lambda: {p.name: p.read_bytes() for p in shards.glob("*.array_record")}
  shards = data.prepare(tmp_path)
  before = read()
  assert len(before) > 4
  for seed in range(3):
    hurt(shards, np.random.default_rng(seed))
    assert read() != before
    data.prepare(tmp_path)
    assert read() == before


def test_torn_folders_differ(tmp_path):
  for seed in range(30):
    folder = tmp_path / str(seed)
    (folder / "state").mkdir(parents=True)
    for name in ("a", "state/b"):
      (folder / name).write_bytes(b"12345678")
    assert data.tear(folder, np.random.default_rng(seed))
    whole = {"a", "state/b"}
    assert whole != {
      str(p.relative_to(folder))
      for p in folder.rglob("*")
      if p.is_file() and p.read_bytes() == b"12345678"
    }


def test_one_batch_is_poisoned_and_no_other():
  for skip in (0, 2):
    poisoned = faults_run._Poisoned(stub.Data(), 3, stub.BATCH)
    poisoned.set_state({"next_row": skip * stub.BATCH})
    for i in range(skip, 5):
      rows = next(poisoned)
      assert np.isfinite(rows["weights"]).all() == (i != 3)
    assert poisoned.get_state() == {"next_row": 5 * stub.BATCH}


def test_every_kind_says_what_it_does():
  assert all(kind.__doc__ for kind in kinds.KINDS.values())
  assert files.FREE  # The skipping runs change a key that may change.
  assert kinds.SKIP.removeprefix("--config.").partition("=")[0] in files.FREE
