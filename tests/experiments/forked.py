"""Runs many commands in one process that has imported what they need.

Each command is a fork of it, before any device is touched: a second a command,
where a process of its own takes several.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Done(NamedTuple):
  """How a command ended."""

  returncode: int
  stdout: str
  stderr: str


def run(commands: list[list[str]], cwd: pathlib.Path) -> list[Done]:
  """Runs commands one after the other in a folder.

  Args:
    commands: the module below experiments, and its arguments.
    cwd: the folder.
  """
  cache = {"JAX_COMPILATION_CACHE_DIR": os.environ["NL_TEST_CACHE"]}
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-m", "tests.experiments.forked"],
    input=json.dumps({"cwd": str(cwd), "commands": commands}),
    capture_output=True, text=True, cwd=ROOT, timeout=600,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **cache},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return [Done(*x) for x in json.loads(done.stdout)]


def _main() -> None:
  import jax  # noqa: F401
  import matplotlib.backends.backend_agg  # noqa: F401
  import matplotlib.backends.backend_svg  # noqa: F401
  import orbax.checkpoint  # noqa: F401

  import nl_jax.build  # noqa: F401
  import nl_jax.data.pipeline  # noqa: F401
  import nl_jax.train.loop  # noqa: F401

  asked = json.load(sys.stdin)
  results = [_one(command, asked["cwd"]) for command in asked["commands"]]
  print(json.dumps(results))


def _one(command: list[str], cwd: str) -> list:
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    pid = os.fork()
    if not pid:
      _child(command, cwd, out.fileno(), err.fileno())
    _, status = os.waitpid(pid, 0)
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read())
  return [os.waitstatus_to_exitcode(status), *texts]


def _child(command: list[str], cwd: str, out: int, err: int) -> None:
  os.dup2(out, 1)
  os.dup2(err, 2)
  os.chdir(cwd)
  code = run_module(command)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def run_module(command: list[str]) -> int:
  """Runs a command in this process; its exit status."""
  import runpy

  sys.argv = list(command)
  try:
    runpy.run_module(f"experiments.{command[0]}", run_name="__main__")
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
      return 1
    return error.code or 0
  return 0


if __name__ == "__main__":
  _main()
