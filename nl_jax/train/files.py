"""The folder of one run: whose it is, what it holds, what changed when."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from nl_jax import files as whole
from nl_jax import formats
from nl_jax.train import config as configs
from nl_jax.train import environment, kept

FORMAT = 2  # Of config.json and of a checkpoint's meta; both say it.
CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
CHANGES = "changes"  # Of config.json: [{"step", "changes"}], oldest first.
CHAIN = "chain"  # Of config.json: what the run came from (`origin.chain`).
_ORIGIN = ("workdir", "keep", "source", "path", "fingerprint")
_TRACES = {
  CHANGES: {"step": int, "changes": list},
  CHAIN: {"step": int, **dict.fromkeys(_ORIGIN, str)},
}
_SAVED = "saved"  # Of config.json: whether there has been a checkpoint.
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

StorageError = whole.StorageError
_ADVICE = (
  "free space or fix the permissions, and start the same command again: it "
  "resumes from the newest checkpoint"
)
writing = functools.partial(whole.writing, advice=_ADVICE)


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
    ValueError: its config file is not a run's, or of an unknown format.
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
  for key, shape in _TRACES.items():
    if not _is_trace(about, key, shape):
      raise _no_config(path)
  return about | {"config": configs.upgraded(config)}


def _is_trace(
  about: Mapping[str, Any], key: str, shape: Mapping[str, type]
) -> bool:
  """Whether a key is missing, or a list of objects with these fields."""
  return isinstance(about.get(key, []), list) and all(
    isinstance(entry, dict)
    and all(isinstance(entry.get(k), kind) for k, kind in shape.items())
    for entry in about.get(key, [])
  )


def _no_config(path: pathlib.Path) -> ValueError:
  return ValueError(
    f"{path} is not the {CONFIG} of a run; give another --workdir or move it "
    "away"
  )


def check(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  fingerprint: str,
  *,
  allow_config_change: bool = False,
) -> dict[str, Any] | None:
  """Finds whether a workdir is, or can become, this run's; changes nothing.

  Args:
    workdir: need not be there.
    config: resolved, nested dicts of JSON values.
    fingerprint: of the data.
    allow_config_change: the config may differ.

  Returns:
    What its `CONFIG` says; None where there is none.

  Raises:
    ValueError: the workdir holds another run; the differing keys are listed.
  """
  if (workdir / CONFIG).exists():
    before = read_about(workdir)
    now = {"config": _plain(config), "fingerprint": fingerprint}
    _check_same(workdir, before, now, allow_config_change)
    return before
  names = (CHECKPOINTS, METRICS, RESULTS)
  foreign = [name for name in names if (workdir / name).exists()]
  if foreign:
    raise ValueError(
      f"{workdir} holds {', '.join(foreign)} but no {CONFIG}, so it cannot "
      "be this run's; give another --workdir or move it away"
    )
  return None


def check_lost(workdir: pathlib.Path, before: Mapping[str, Any] | None) -> None:
  """Refuses to begin again where a run was that lost its checkpoints.

  Args:
    workdir: has no checkpoint.
    before: of `check`.

  Raises:
    ValueError: there has been a checkpoint.
  """
  if before is None:
    return
  found = [name for name in (METRICS, RESULTS) if (workdir / name).exists()]
  had = before.get(_SAVED, False) or RESULTS in found
  if before.get("format", 1) == 1 and METRICS in found:
    # It did not say whether it had saved; its last line may tell.
    every = before["config"].get("checkpoint", {}).get("every", 0)
    had = had or 0 < every < _last_step(workdir / METRICS)
  if had:
    raise ValueError(
      f"{workdir} is a run that lost its checkpoints: {CHECKPOINTS} is gone or "
      f"empty, beside {', '.join([CONFIG, *found])}; bring {CHECKPOINTS} back "
      "(is its disk mounted?), or give another --workdir to begin again"
    )


def _last_step(path: pathlib.Path) -> int:
  """Of the last whole line of the metrics; 0 where there is none."""
  step = 0
  for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
    with contextlib.suppress(ValueError, TypeError, KeyError):
      step = int(json.loads(text)["step"])
  return step


def claim(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  fingerprint: str,
  *,
  allow_config_change: bool = False,
  step: int = 0,
  more: Mapping[str, Any] | None = None,
) -> list[str]:
  """Makes the workdir this run's, or finds that it already is.

  Args:
    workdir: made if missing.
    config: resolved, nested dicts of JSON values.
    fingerprint: of the data.
    allow_config_change: take the new config where it differs.
    step: that the run stands at: what changes is written down with it.
    more: what else a new `CONFIG` says.

  Returns:
    "key: old -> new" of each field that changed.

  Raises:
    ValueError: the workdir holds another run; the differing keys are listed.
    StorageError: it cannot be written.
  """
  before = check(
    workdir, config, fingerprint, allow_config_change=allow_config_change
  )
  make_workdir(workdir)
  config = _plain(config)
  changes = differences(before["config"], config, free=()) if before else []
  tokenizer = before.get(kept.KEY) if before else None
  if tokenizer is None:
    with writing(workdir / kept.FOLDER):
      tokenizer = kept.keep(workdir, config)
  if before and not changes and tokenizer == before.get(kept.KEY):
    return []
  about = {
    **(before or {_SAVED: False, **(more or {})}),
    "format": FORMAT,
    "config": config,
    "fingerprint": fingerprint,
    **({kept.KEY: tokenizer} if tokenizer else {}),
    **environment.describe(),
  }
  if changes:
    about[CHANGES] = [
      *about.get(CHANGES, []), {"step": step, "changes": changes}
    ]  # fmt: skip
  write_json(workdir / CONFIG, about)
  return changes


def mark_saved(workdir: pathlib.Path) -> None:
  """Notes that the run has a checkpoint: it is not begun again without."""
  about = read_about(workdir)
  if not about.get(_SAVED, False):
    write_json(workdir / CONFIG, {**about, "format": FORMAT, _SAVED: True})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """As JSON gives it back."""
  return json.loads(json.dumps(config))


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
      f"the data, or continue with these in another --workdir: "
      f"--from={workdir} --keep=optimizer"
    )
  changes = differences(before["config"], now["config"])
  if changes and not allow_config_change:
    raise ValueError(
      f"{workdir} holds a run with another config: {'; '.join(changes)}. Give "
      "another --workdir, or --allow_config_change to continue with this one"
    )


def differences(
  before: Mapping[str, Any],
  now: Mapping[str, Any],
  prefix: str = "",
  free: tuple[str, ...] = FREE,
) -> list[str]:
  """ "key: old -> new" for each key that differs, but those that are free."""
  changes = []
  for key in sorted({*before, *now}):
    name = f"{prefix}{key}"
    a, b = before.get(key, _MISSING), now.get(key, _MISSING)
    if name in free or a == b:
      continue
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      changes += differences(a, b, f"{name}.", free)
    else:
      shown = [x if x is _MISSING else repr(x) for x in (a, b)]
      changes.append(f"{name}: {' -> '.join(shown)}")
  return changes


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this process; the system frees it on any death.

  A folder that was made for it and that no run claimed is gone afterwards.

  Raises:
    ValueError: another process trains there.
  """
  made = not workdir.exists()
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
        if made:
          with contextlib.suppress(OSError):  # Something else is in it.
            workdir.rmdir()
