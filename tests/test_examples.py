"""The examples run, and what they print of themselves holds."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_own_memory():
  """Its forms agree, it learns, reads in pieces, and compiles for a TPU."""
  done = subprocess.run(
    [sys.executable, "examples/own_memory.py", "--steps=40"],
    capture_output=True, text=True, cwd=ROOT, timeout=300,
    env=os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
    },
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  said = dict(re.findall(r"^(.+): (\S+e[-+]\d+)$", done.stdout, re.M))
  assert {name: float(x) < 1e-4 for name, x in said.items()} == {
    "chunk form and token loop": True,
    "kernels and chunk form, values": True,
    "kernels and chunk form, gradients": True,
    "a row in five pieces and at once": True,
  }
  losses = re.findall(r"^step (\d+): loss (\S+),", done.stdout, re.M)
  assert [int(step) for step, _ in losses] == [1, 40]
  assert float(losses[1][1]) < 0.5 * float(losses[0][1])
  last = done.stdout.splitlines()[-1]
  if importlib.util.find_spec("libtpu") is None:
    assert "libtpu, its compiler, is not installed" in last
  else:
    assert last == (
      "compiled for v5e: own_memory_bwd, own_memory_fwd; loops: 0"
    )
