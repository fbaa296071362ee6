"""What a wheel holds: all of nl_jax, through its link to kernels, once."""

import os
import pathlib
import subprocess
import sys

import pytest

import nl_jax

ROOT = pathlib.Path(__file__).parents[1]
# Of developers: what TPU compilers said (experiments.kernels --report).
_NOT_SHIPPED = "nl_jax/kernels/walk/baselines/"
_LIST = """
from setuptools._distutils.core import run_setup
dist = run_setup("setup.py", stop_after="init")
build = dist.get_command_obj("build_py")
build.build_lib = "."
build.ensure_finalized()
print(dist.get_version(), *build.get_outputs(include_bytecode=False), sep="\\n")
"""


def test_the_wheel_holds_the_tree():
  pytest.importorskip("setuptools", reason="setuptools is not installed")
  out = subprocess.run(
    [sys.executable, "-c", _LIST],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  version, *shipped = out.stdout.split()
  tree = {
    os.path.relpath(os.path.join(folder, name), ROOT)
    for folder, _, names in os.walk(ROOT / "nl_jax", followlinks=True)
    for name in names
    if not folder.endswith("__pycache__")
  }
  tree = {path for path in tree if not path.startswith(_NOT_SHIPPED)}
  assert sorted(os.path.normpath(path) for path in shipped) == sorted(tree)
  assert version == nl_jax.__version__
  assert "nl_jax/kernels/walk/api.py" in tree


def test_a_bare_checkout_has_the_kernels():
  link = ROOT / "nl_jax" / "kernels"
  assert os.readlink(link) == os.path.join("..", "kernels")
  code = "import nl_jax.kernels as x; print(x.__file__)"
  out = subprocess.run(
    [sys.executable, "-S", "-c", code],  # -S: nothing that is installed.
    env={"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True,
    check=True,
  )  # fmt: skip
  assert out.stdout.strip() == str(link / "__init__.py")
