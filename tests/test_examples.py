"""The examples run, and what they print of themselves holds."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

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


def _optimizers():
  try:
    importlib.metadata.version("scikit-learn")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs scikit-learn, of the extra dev")
  path = ROOT / "examples" / "optimizers.py"
  spec = importlib.util.spec_from_file_location("examples_optimizers", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_optimizers(tmp_path, monkeypatch, capsys):
  """Some of its optimizers learn in a few steps, and are drawn."""
  example = _optimizers()
  few = {k: example.ARMS[k] for k in ("adam (optax)", "m3", "deep_momentum")}
  monkeypatch.setattr(example, "ARMS", few)
  found = example.compare(12)
  assert set(found) == set(few)
  for name, got in found.items():
    assert got["losses"].shape == (3, 3, 12) and got["accuracy"].shape == (3, 3)
    assert np.isfinite(got["losses"][1]).all(), name
    assert got["losses"][1, :, -1].mean() < got["losses"][1, :, 0].mean()
  example.draw(found, str(tmp_path / "picture.png"))
  assert (tmp_path / "picture.png").stat().st_size > 10_000
  assert "m3: " in capsys.readouterr().out


def test_optimizers_start_where_their_page_says():
  page = (ROOT / "docs" / "optimizers.md").read_text("utf-8")
  said = dict(re.findall(r"^\| `optim\.(\w+)\((\S+?)[,)]", page, re.M))
  arms = {k: arm.rate for k, arm in _optimizers().ARMS.items()}
  assert {k: float(x) for k, x in said.items()} == {
    k: rate for k, rate in arms.items() if "optax" not in k
  }
