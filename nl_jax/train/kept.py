"""The tokenizer that a workdir keeps, so that a run is whole wherever it is.

A config names its tokenizer by a path, which need not mean anything in another
folder or on another machine. What a run was made with is copied beside it, and
`config.json` says the hash of each file.
"""

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from nl_jax import files

KEY = "tokenizer"  # Of config.json: {"file", "sha256": {name: hash}}.
FOLDER = "tokenizer"
# What stands beside a tokenizer of a pretrained model, and goes with it.
BESIDE = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "config.json",
)


def keep(
  workdir: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Copies the files of a config's tokenizer into the workdir.

  Args:
    workdir: of the run.
    config: resolved, nested dicts.

  Returns:
    What `KEY` says of it; None where the tokenizer is not a file.
  """
  name = config.get("data", {}).get("tokenizer", "")
  path = pathlib.Path(name).expanduser() if name else None
  if path is None or not path.is_file():
    return None
  folder = workdir / FOLDER
  folder.mkdir(exist_ok=True)
  hashes = {}
  for source in (path, *_beside(path)):
    copy = folder / source.name
    if not (copy.exists() and copy.samefile(source)):
      shutil.copyfile(source, copy)
    hashes[source.name] = files.sha256(copy)
  return {"file": path.name, "sha256": hashes}


def _is_said(value: Any) -> bool:
  """Whether it is what `keep` gives: names of files, no paths."""
  if not isinstance(value, dict) or not isinstance(value.get("sha256"), dict):
    return False
  names = [value.get("file"), *value["sha256"]]
  return all(
    isinstance(x, str) and x and pathlib.PurePath(x).name == x for x in names
  )


def _beside(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that say more of a tokenizer: its end, above all."""
  names: tuple[str, ...] = BESIDE if path.name in BESIDE else BESIDE[2:3]
  if path.suffix != ".json" and path.name not in BESIDE:
    names = ()
  return [
    path.with_name(name)
    for name in names
    if name != path.name and path.with_name(name).is_file()
  ]


def path_of(workdir: pathlib.Path, about: Mapping[str, Any]) -> str | None:
  """The tokenizer of a run, in its own workdir; None where it keeps none.

  Args:
    workdir: of the run.
    about: of its config.json.

  Raises:
    ValueError: it is gone, or not what the run was made with.
  """
  said = about.get(KEY)
  if said is None:
    return None
  if not _is_said(said):
    raise ValueError(
      f"{workdir}: its config.json is damaged at {KEY!r}; take a copy of the "
      "file as it was"
    )
  for name, expected in said["sha256"].items():
    path = workdir / FOLDER / name
    found = files.sha256(path) if path.is_file() else "missing"
    if found != expected:
      raise ValueError(
        f"{path} is not the file that the run was made with (SHA-256 "
        f"{found[:12]}, expected {expected[:12]}); copy the tokenizer of the "
        "run back"
      )
  return str(workdir / FOLDER / said["file"])
