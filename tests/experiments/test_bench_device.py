"""The bench of an accelerator: its smallest sizes, what it says and writes."""

import json

import pytest

from experiments.bench import device, peers
from tests.experiments import forked


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  asked = ["bench", "--suite=gpu", "--quick", "--output=rows.json"]
  return folder, forked.run([asked, asked[:2], asked], folder)


def test_the_smallest_sizes_run_anywhere(commands):
  folder, (done, *_) = commands
  assert done.returncode == 0, done.stderr
  rows = json.loads((folder / "rows.json").read_text())["rows"]
  ours = [row for row in rows if row["kind"] != "ours beside"]
  assert [row["name"] for row in ours] == [*device.MODELS, *device.MODELS[:2]]
  for row in ours:
    assert "error" not in row and row["seconds"] > 0 and row["gib"] > 0
    assert (row["name"] != device.BASE) or row["ratio"] == 1
  table = (folder / "rows.md").read_text().splitlines()
  assert len(table) == len(rows) + 2
  assert (folder / "rows.png").stat().st_size > 5_000


def test_another_device_and_files_that_exist_are_refused(commands):
  _, (_, elsewhere, again) = commands
  assert elsewhere.returncode == 1
  assert "--suite=gpu needs a GPU, got the platform" in elsewhere.stderr
  assert again.returncode == 1 and "rows.md exists" in again.stderr


def test_what_does_not_fit_is_a_row_with_its_reason():
  def fails():
    raise ValueError("RESOURCE_EXHAUSTED: out of memory\nand more")

  row = dict(kind="mixer", name="hope", tokens=64, rows=1)
  assert device._made(row, fails) is None
  device._compare(row, [row])
  assert row["what"].endswith("1 x 64: RESOURCE_EXHAUSTED: out of memory")
  assert "RESOURCE_EXHAUSTED" in device.table([row])


def test_our_rule_is_what_other_libraries_are_asked_for(monkeypatch):
  """A stand-in for a library, and both get the same arrays."""
  seen = []
  monkeypatch.setattr(peers, "_jla", lambda x: seen.append(x) or (lambda: None))
  found = peers.importlib.util.find_spec
  monkeypatch.setattr(
    peers.importlib.util, "find_spec",
    lambda name: found("json") if name == "jla" else None,
  )  # fmt: skip
  times = {"nl_jax": 2.0, "jax-linear-attention": 1.0}
  timed = lambda calls: (calls["nl_jax"](), times)[1]
  (row,) = peers.run(timed, None, quick=True)
  assert row["ratio"] == 2 and seen[0]["q"].shape == peers._QUICK
