"""A run killed by SIGKILL, while it saves too, ends as one that was not."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from tests.train import test_loop, victim

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "tests.train.victim", str(workdir)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(process: subprocess.Popen, folder: pathlib.Path, pattern: str):
  """Until a file is there; the process must live until then."""
  limit = time.monotonic() + 60
  while not any(folder.glob(pattern)):
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < limit
    time.sleep(0.001)


def finish(process: subprocess.Popen) -> None:
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors


def test_killed_run_ends_as_one_that_was_not(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  reference = start(whole)
  steps = killed / "checkpoints"
  for pattern in ("6.orbax-checkpoint-tmp", "1[2-9]"):
    process = start(killed)
    wait_for(process, steps, pattern)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(start(killed))
  finish(reference)
  assert test_loop.lines(whole) == test_loop.lines(killed)
  assert test_loop.lines(killed)[-1]["step"] == victim.STEPS
  with (
    np.load(f"{whole}_final.npz") as a,
    np.load(f"{killed}_final.npz") as b,
  ):
    assert set(a) == set(b) and len(a) == 3
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
