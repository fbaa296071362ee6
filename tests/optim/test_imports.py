"""nl_jax.optim needs only jax, optax and numpy; its names are functions."""

import subprocess
import sys

import nl_jax.optim


def test_public_names_are_not_modules():
  import importlib

  importlib.import_module("nl_jax.optim._deep_momentum")
  for name in ("m3", "deep_momentum", "delta_momentum", "multi_frequency"):
    assert callable(getattr(nl_jax.optim, name))


def test_imports_nothing_heavy():
  code = (
    "import sys, nl_jax.optim\n"
    "heavy = {'flax', 'grain', 'orbax', 'tensorflow', 'ml_collections'}\n"
    "print(sorted(heavy & set(sys.modules)))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "[]"
