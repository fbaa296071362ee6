"""A disk that fills up: told in a sentence, at once, and nothing is lost."""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import checkpoint, files, loop, metrics
from tests.train import stub

ROOT = pathlib.Path(__file__).parents[2]
COMMON = dict(log_every=500, checkpoint_every=4, steps=24)


@pytest.fixture
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


@contextlib.contextmanager
def limit():
  """Yields (full, free): between them the system refuses to write on.

  A file may not grow beyond 64 bytes: a real refusal of real writes, that
  needs no disk of its own.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  put = lambda soft: resource.setrlimit(
    resource.RLIMIT_FSIZE, (soft, before[1])
  )
  try:
    yield lambda: put(64), lambda: put(before[0])
  finally:
    put(before[0])


_RUN = """
import resource, sys, time
import jax
from nl_jax import sharding
from nl_jax.train import checkpoint, files
from tests.train import stub, test_storage

def hook(i):
  if i == 6:  # Step 4 is saved, step 8 will not be.
    while checkpoint.latest_step(sys.argv[1]) != 4:
      time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
  print(i, flush=True)

try:
  stub.run(sys.argv[1], data=stub.Data(hook=hook), **test_storage.COMMON)
except files.StorageError as error:
  sys.exit(str(error))
"""


def test_a_checkpoint_that_cannot_be_written_ends_the_run_soon(tmp_path):
  folder = tmp_path / "run"
  full = subprocess.run(
    [sys.executable, "-c", _RUN, str(folder)], capture_output=True, text=True,
    timeout=120, cwd=ROOT, env=os.environ,
  )  # fmt: skip
  assert full.returncode == 1, full.stderr
  assert "checkpoints/8 cannot be written" in full.stderr
  assert "Traceback" not in full.stderr
  # Raised by the next save at the latest, not at the end of the run.
  assert int(full.stdout.split()[-1]) < 12
  assert checkpoint.latest_step(str(folder)) == 4
  mesh = sharding.mesh(devices=jax.devices()[:1])
  rest = stub.run(folder, mesh=mesh, **COMMON)
  whole = stub.run(tmp_path / "whole", mesh=mesh, **COMMON)
  jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)


def test_metrics_on_a_full_disk_are_one_sentence(tmp_path):
  with pytest.raises(files.StorageError, match="No space left on device"):
    with metrics.Writer(tmp_path) as writer:
      writer.write(1, {"a": 1.0})
      writer._file.close()
      writer._file = open("/dev/full", "a")
      writer.write(2, {"a": 2.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1]


def test_events_on_a_full_disk_do_not_hang(tmp_path):
  with limit() as (full, free):
    with pytest.raises(files.StorageError, match="cannot be written"):
      with metrics.Writer(tmp_path) as writer:
        full()
        writer._file.close()
        writer._file = open(os.devnull, "a")
        for step in range(5000):  # Beyond any buffer.
          writer.write(step, {"a": 1.0})
    free()


def test_a_file_in_the_place_of_the_workdir(tmp_path):
  (tmp_path / "run").write_text("precious")
  with pytest.raises(ValueError, match="run is a file"):
    stub.run(tmp_path / "run")
  assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED", "Out of memory"])
def test_too_little_memory_says_what_to_lower(tmp_path, one_device, said):
  def hook(i):
    if i == 2:
      # What XLA raises, raised in its place: a CPU swaps instead.
      raise jax.errors.JaxRuntimeError(f"{said}: 9 GiB wanted")

  with pytest.raises(loop.OutOfMemoryError, match="data.batch_size") as told:
    stub.run(tmp_path, mesh=one_device, data=stub.Data(hook=hook))
  assert "9 GiB wanted" in str(told.value)
