"""Programs compiled ahead of time for chips that are not here.

A test module names `MARKS` as its `pytestmark`.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

MARKS = [
  pytest.mark.tpu_aot,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: no ahead-of-time TPU compiler",
  ),
]


def run(script: str, *arguments: Any) -> dict[str, Any]:
  """The JSON of a script's last line, run in a process of its own.

  Args:
    script: Python code.
    arguments: of the script, `json.loads(sys.argv[1])`.
  """
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  done = subprocess.run(
    [sys.executable, "-c", script, json.dumps(arguments)],
    capture_output=True,
    text=True,
    timeout=240,
    env=env,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.strip().splitlines()[-1])
