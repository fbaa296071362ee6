"""Files that are whole or not there, and the folder of one run."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from nl_jax import files as whole
from nl_jax import formats
from nl_jax.train import config as configs
from nl_jax.train import environment

FORMAT = 2  # Of config.json and of a checkpoint's meta; both say it.
CONFIG = "config.json"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"

# Keys that change no number of the run: they may differ on resume.
FREE = (
  "checkpoint",
  "eval",
  "mesh",
  "model.mixer.remat_group",
  "model.mixer.walk",
  "train.eval_every",
  "train.log_every",
  "train.max_skipped",
  "train.nan_policy",
  "train.profile_steps",
)
_MISSING = "nothing"


class StorageError(OSError):
  """A file of the run cannot be written; the message says which and why."""

  @classmethod
  def of(cls, path: pathlib.Path, reason: object) -> "StorageError":
    """The sentence about a path."""
    return cls(
      f"{path} cannot be written: {reason}; free space or mend the "
      "permissions, and start the same command again: it goes on from the "
      "newest checkpoint"
    )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """What the system says of a path becomes a `StorageError`."""
  try:
    yield
  except StorageError:
    raise
  except OSError as error:
    raise StorageError.of(path, error.strerror or error) from error


def make_workdir(workdir: pathlib.Path) -> None:
  """Makes the folder of a run.

  Raises:
    ValueError: a file is in the way.
    StorageError: the system refuses.
  """
  if workdir.is_file():
    raise ValueError(f"{workdir} is a file; give --workdir a folder")
  with writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file; killed at any moment, it is the old or the new one.

  Raises:
    StorageError: the system refuses.
  """
  with writing(path):
    whole.write(path, text)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file as a whole."""
  replace(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    ValueError: it is none.
  """
  try:
    return whole.read_json(path)
  except ValueError as error:
    raise ValueError(
      f"{error}; move the workdir away and start again"
    ) from error


def check_format(path: pathlib.Path, what: str, about: Mapping) -> None:
  """Raises FormatError for a part of a run that this version cannot read.

  Args:
    path: of the part.
    what: it is, as "a checkpoint".
    about: where it says its format; runs of before there was one say nothing.
  """
  found = about.get("format", 1)
  formats.check(path, what, found, FORMAT, "train again in another --workdir")


def read_about(workdir: pathlib.Path) -> dict[str, Any]:
  """The config and fingerprint that a run left in its workdir.

  Raises:
    ValueError: its config file is no run's, or of an unknown format.
  """
  return read_config_file(workdir / CONFIG)


def read_config_file(path: pathlib.Path) -> dict[str, Any]:
  """What `read_about` gives, of a file that may have another name.

  Raises:
    ValueError: as there.
  """
  about = read_json(path)
  if not isinstance(about, dict) or not {"config", "fingerprint"} <= {*about}:
    raise _no_config(path)
  check_format(path, "a run", about)
  config = about["config"]
  if not isinstance(config, dict) or not isinstance(about["fingerprint"], str):
    raise _no_config(path)
  if not isinstance(config.get("model", {}), dict):
    raise _no_config(path)
  return about | {"config": configs.upgraded(config)}


def _no_config(path: pathlib.Path) -> ValueError:
  return ValueError(
    f"{path} is not the {CONFIG} of a run; give another --workdir or move it "
    "away"
  )


def claim(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  fingerprint: str,
  *,
  allow_config_change: bool = False,
) -> None:
  """Makes the workdir this run's, or finds that it already is.

  Args:
    workdir: made if missing.
    config: resolved, nested dicts of JSON values.
    fingerprint: of the data.
    allow_config_change: take the new config where it differs.

  Raises:
    ValueError: the workdir holds another run; the differing keys are listed.
  """
  make_workdir(workdir)
  path = workdir / CONFIG
  config = json.loads(json.dumps(config))
  about = {"config": config, "fingerprint": fingerprint}
  if not path.exists():
    foreign = [
      name
      for name in (CHECKPOINTS, "metrics.jsonl", RESULTS)
      if (workdir / name).exists()
    ]
    if foreign:
      raise ValueError(
        f"{workdir} holds {', '.join(foreign)} but no {CONFIG}, so it cannot "
        "be this run's; give another --workdir or move it away"
      )
  else:
    before = read_about(workdir)
    _check_same(workdir, before, about, allow_config_change)
    if before["config"] == config:
      return
  write_json(path, {"format": FORMAT, **about, **environment.describe()})


def _check_same(
  workdir: pathlib.Path,
  before: Mapping[str, Any],
  now: Mapping[str, Any],
  allow_config_change: bool,
) -> None:
  if before["fingerprint"] != now["fingerprint"]:
    raise ValueError(
      f"{workdir} was trained on other data (fingerprint "
      f"{before['fingerprint'][:12]}, now {now['fingerprint'][:12]}); restore "
      "the data or give another --workdir"
    )
  changes = differences(before["config"], now["config"])
  if changes and not allow_config_change:
    raise ValueError(
      f"{workdir} holds a run with another config: {'; '.join(changes)}. Give "
      "another --workdir, or --allow_config_change to go on with this one"
    )


def differences(
  before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """ "key: old -> new" for each key that differs, but those of `FREE`."""
  changes = []
  for key in sorted({*before, *now}):
    name = f"{prefix}{key}"
    a, b = before.get(key, _MISSING), now.get(key, _MISSING)
    if name in FREE or a == b:
      continue
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      changes += differences(a, b, f"{name}.")
    else:
      shown = [x if x is _MISSING else repr(x) for x in (a, b)]
      changes.append(f"{name}: {' -> '.join(shown)}")
  return changes


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this process; the system frees it on any death.

  Raises:
    ValueError: another process trains there.
  """
  make_workdir(workdir)
  with contextlib.ExitStack() as stack:
    try:
      with writing(workdir / _LOCK):
        stack.enter_context(whole.lock(workdir / _LOCK))
    except whole.HeldError as error:
      raise ValueError(
        f"another process is training in {workdir}; wait for it or stop it"
      ) from error
    try:
      yield
    finally:
      if not (workdir / CONFIG).exists():  # It was not made this run's.
        (workdir / _LOCK).unlink(missing_ok=True)
