"""What a run was made with: versions of libraries and of the code."""

import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def describe() -> dict[str, Any]:
  """{"versions": by package, "git": commit hash, "" outside of a checkout}."""
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = ""
  return {"versions": versions, "git": _git_hash()}


def _git_hash() -> str:
  try:
    answer = subprocess.run(
      ["git", "rev-parse", "HEAD"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return answer.stdout.strip() if answer.returncode == 0 else ""
