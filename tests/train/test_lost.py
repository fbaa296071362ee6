"""Nothing of a run changes, or is begun again, without a word."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import checkpoint, files, stored
from tests.train import stub


@pytest.fixture(scope="module")
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def done(one_device, tmp_path_factory) -> pathlib.Path:
  """A run of four steps, with a checkpoint at 2 and 4."""
  folder = tmp_path_factory.mktemp("done") / "run"
  stub.run(folder, mesh=one_device, steps=4, checkpoint_every=2)
  return folder


@pytest.fixture
def run(done, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(done, tmp_path / "run"))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file of a folder but the lock."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in folder.rglob("*")
    if p.is_file() and p.name != ".lock"
  }


@pytest.mark.parametrize(
  ("change", "text"),
  [
    (dict(model=stub.Model((64, 128))), "another model or optimizer"),
    (dict(optim={"name": "delta_momentum"}), "another model or optimizer"),
    (dict(steps=3), "beyond train.steps=3"),
  ],
)
def test_a_refused_change_of_the_config_changes_nothing(
  run, one_device, change, text
):
  before = contents(run)
  with pytest.raises(ValueError, match=text):
    stub.run(
      run, mesh=one_device, config={"model": {"width": 9}},
      allow_config_change=True, **change,
    )  # fmt: skip
  assert contents(run) == before
  assert stub.run(run, mesh=one_device, steps=4).step == 4


def test_a_refusal_moves_no_damaged_checkpoint(run, one_device):
  shutil.rmtree(run / "checkpoints" / "4" / "state")
  before = contents(run)
  with pytest.raises(ValueError, match="beyond train.steps=1"):
    stub.run(
      run, mesh=one_device, steps=1, config={"model": {"width": 9}},
      allow_config_change=True,
    )  # fmt: skip
  assert contents(run) == before


@pytest.mark.parametrize("keep", ["weights", "optimizer", "all"])
def test_a_refused_origin_claims_no_workdir(run, one_device, tmp_path, keep):
  for path in (run / "checkpoints").glob("*/state/**/d/*"):
    path.write_bytes(b"")  # Found when it is read, and not before.
  with pytest.raises(ValueError, match="can be read"):
    stub.run(tmp_path / "new", mesh=one_device, steps=8, origin=run, kept=keep)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", ["gone", "empty"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_lost_its_checkpoints_is_not_begun_again(
  run, one_device, how, finished
):
  shutil.rmtree(run / "checkpoints")
  if how == "empty":
    (run / "checkpoints").mkdir()
  if not finished:
    (run / "results.json").unlink()
  before = contents(run)
  with pytest.raises(ValueError, match="lost its checkpoints"):
    stub.run(run, mesh=one_device, steps=4)
  assert contents(run) == before


def test_a_run_of_before_that_lost_its_checkpoints_is_told(run, one_device):
  shutil.rmtree(run / "checkpoints")
  (run / "results.json").unlink()
  config = {"checkpoint": {"every": 2}}
  files.write_json(run / "config.json", {"config": config, "fingerprint": "f"})
  with pytest.raises(ValueError, match="lost its checkpoints"):
    stub.run(run, mesh=one_device, steps=4, config=config)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
  one_device, tmp_path
):
  def hook(i):
    if i == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stub.run(tmp_path, mesh=one_device, log_every=1, data=stub.Data(hook=hook))
  assert (tmp_path / "metrics.jsonl").read_text()
  assert stub.run(tmp_path, mesh=one_device).step == 10


class Rows(stub.Data):
  """Row k is a function of k, whatever the size of a batch."""

  def __init__(self, size: int):
    super().__init__()
    self.size, self.row, self.seen = size, 0, []

  def __next__(self) -> dict[str, np.ndarray]:
    rows = range(self.row, self.row + self.size)
    self.seen += rows
    self.row += self.size
    draw = lambda k: np.random.default_rng(k).integers(1, 16, stub.LENGTH)
    inputs = np.stack([draw(k) for k in rows]).astype(np.int32)
    ones = np.ones_like(inputs)
    return {
      "inputs": inputs, "targets": inputs,
      "weights": ones.astype(np.float32), "segment_ids": ones,
    }  # fmt: skip

  def get_state(self) -> dict[str, int]:
    return {"next_row": self.row}

  def set_state(self, state: dict[str, int]) -> None:
    self.row = state["next_row"]


@pytest.mark.parametrize("other", [False, True])
def test_another_batch_size_reads_each_row_once(one_device, tmp_path, other):
  first, second = Rows(8), Rows(4)
  common = dict(mesh=one_device, log_every=1)
  stub.run(tmp_path / "a", steps=3, data=first, **common)
  # Into the same workdir, or into another that resumes from it.
  place = {"workdir": tmp_path / "a", "allow_config_change": True}
  if other:
    place = {"workdir": tmp_path / "b", "origin": tmp_path / "a", "kept": "all"}
  stub.run(
    steps=5, data=second, batch_size=4, config={"data": {"batch_size": 4}},
    **place, **common,
  )  # fmt: skip
  assert first.seen + second.seen == list(range(32))
  text = (place["workdir"] / "metrics.jsonl").read_text().splitlines()
  tokens = [json.loads(line)["tokens"] for line in text]
  assert tokens[-2:] == [4 * 28, 4 * 32]
  if not other:
    assert tokens == [32, 64, 96, 112, 128]
  folder = place["workdir"] / "checkpoints" / "5"
  meta = json.loads((folder / "meta" / "metadata").read_text())
  assert (meta["rows_consumed"], meta["tokens"]) == (32, 128)


def test_a_place_that_was_counted_in_batches_is_read():
  meta = {"batch_size": 8}
  assert stored._place({"next_index": 3}, meta) == {"next_row": 24}
  assert stored._place({"next_row": 3}, meta) == {"next_row": 3}


def test_a_step_that_goes_while_it_is_read_is_no_damage(tmp_path):
  """Beside a live run with checkpoint.keep=1."""
  steps = tmp_path / "checkpoints"
  (steps / "1").mkdir(parents=True)

  def read(step):
    if step == 1:
      (steps / "2").mkdir()
      shutil.rmtree(steps / "1")
      raise FileNotFoundError("gone")
    return step

  assert stored.newest(tmp_path, read) == (2, {})


def test_a_reader_beside_a_live_run_that_keeps_one(one_device, tmp_path):
  """Each read gives a step not older than what was there before."""
  seen = []

  def hook(i):
    before = checkpoint.latest_step(str(tmp_path))
    if before is not None:
      with jax.transfer_guard("allow"):
        seen.append(checkpoint.load_params(str(tmp_path), stub.Model())[1])
      assert seen[-1] >= before

  stub.run(
    tmp_path, mesh=one_device, data=stub.Data(hook=hook), keep=1,
    checkpoint_every=1, steps=8,
  )  # fmt: skip
  assert len(set(seen)) > 2


def test_what_changes_is_said_and_written_down(run, one_device, caplog):
  caplog.set_level("INFO", "absl")
  stub.run(
    run, mesh=one_device, steps=6, allow_config_change=True,
    config={"model": {"width": 9}, "eval": {"batches": 2}},
  )  # fmt: skip
  about = files.read_about(run)
  assert about["changes"] == [
    {"step": 4, "changes": ["eval: nothing -> {'batches': 2}",
                            "model.width: 8 -> 9"]}
  ]  # fmt: skip
  assert "changed at step 4: model.width: 8 -> 9" in caplog.text
  stub.run(
    run, mesh=one_device, steps=8, allow_config_change=True,
    config={"model": {"width": 8}, "eval": {"batches": 2}},
  )  # fmt: skip
  changes = files.read_about(run)["changes"]
  assert [x["step"] for x in changes] == [4, 6]
