"""Injects faults into runs, and compares each with an undisturbed run.

    python -m experiments.faults --kills=20
    python -m experiments.faults --kills=5 --only=full_disk,torn_checkpoint

Small runs are trained. At a random moment each is killed, stopped, given a
full disk, torn checkpoints, data that vanish or are corrupt, or a batch that is
not finite. Then the same command is started again. It must end with the same
parameters, optimizer state and metrics, bit for bit, as a run that was left
alone, or say in one sentence what is wrong; then what the sentence asks for is
done, and the next start must end so.

Prints a table in Markdown and writes faults.json. The same command, with more
--kills perhaps, resumes where it was stopped. Status 3: a run went wrong; its
folder is kept.
"""

import concurrent.futures
import difflib
import pathlib
import resource
import signal
from typing import Any

from absl import flags, logging

from experiments.cli import command, named

_KILLS = flags.DEFINE_integer(
  "kills",
  None,
  "Number of faults, taken from the kinds in turn.",
  lower_bound=1,
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Folder of all runs.")
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the times and of the damage.", lower_bound=0
)
_ONLY = flags.DEFINE_list(
  "only", [], "Kinds, with commas between; --only=list names all."
)
_CONFIGS = flags.DEFINE_list(
  "configs",
  ["transformer_tiny:smoke", "hope_linear_tiny:smoke"],
  "Configs of the runs, in turn.",
)
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "How many runs at a time.", lower_bound=1
)
_PLAN = "plan.json"
RESULT = "faults.json"


def main() -> int:
  """Runs the command; returns its exit status."""
  import jax

  # The accelerator is the runs'.
  jax.config.update("jax_platforms", "cpu")
  from experiments.faults import kinds
  from nl_jax.train import files

  if _ONLY.value == ["list"]:
    for name, kind in kinds.KINDS.items():
      print(f"{name}: {kind.__doc__}")
    return command.DONE
  if _KILLS.value is None:
    raise ValueError("--kills is required: how many faults")
  only = _chosen(list(kinds.KINDS))
  _check_configs()
  folder = pathlib.Path(_WORKDIR.value).resolve()
  logging.set_verbosity(logging.WARNING)
  # A SIGTERM ends the runs under way too; and in the background of a shell,
  # where Ctrl-C is ignored, the runs would inherit that.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.default_int_handler)
  with files.lock(folder):
    _claim(folder, only)
    results = _trials(folder, only)
  return _report(folder, results)


def _chosen(known: list[str]) -> list[str]:
  """The kinds of --only; all of this system without it."""
  for name in _ONLY.value:
    if name not in known:
      close = difflib.get_close_matches(name, known)
      hint = f"Did you mean {' or '.join(close)}? " if close else ""
      raise ValueError(
        f"unknown kind {name!r}. {hint}Known: {', '.join(known)}"
      )
  limits = hasattr(resource, "prlimit")
  if "full_disk" in _ONLY.value and not limits:
    raise ValueError(
      "--only=full_disk needs Linux, which limits the files of another "
      "process; leave it out"
    )
  return _ONLY.value or [k for k in known if limits or k != "full_disk"]


def _check_configs() -> None:
  """Raises ValueError for a config that the corpus does not fit."""
  from experiments.faults import data

  for name in _CONFIGS.value:
    length = named.load_config(name).data.sequence_length
    if length != data.LENGTH:
      raise ValueError(
        f"--configs are those of the smoke size, with data.sequence_length="
        f"{data.LENGTH}; got {name!r} with {length}: give {name}:smoke"
      )


def _claim(folder: pathlib.Path, only: list[str]) -> None:
  """Makes the folder this command's, or finds that it is.

  Raises:
    ValueError: it holds something else.
  """
  from nl_jax.train import files

  plan = {"seed": _SEED.value, "only": only, "configs": _CONFIGS.value}
  path = folder / _PLAN
  if not path.exists():
    if any(not p.name.startswith(".") for p in folder.iterdir()):
      raise ValueError(
        f"{folder} is not empty and holds no faults; give another --workdir"
      )
    files.write_json(path, plan)
  before = files.read_json(path)
  if before != plan:
    changes = files.differences(before, plan)
    raise ValueError(
      f"{folder} holds other faults ({'; '.join(changes)}); give another "
      "--workdir"
    )


def _trials(folder: pathlib.Path, only: list[str]) -> list[dict[str, Any]]:
  """All trials, those that were done before read from their files."""
  from experiments.faults import data, scene, trials
  from nl_jax.train import files

  place = trials.Place(folder, _SEED.value)
  place.corpus.mkdir(exist_ok=True)
  data.prepare(place.corpus)
  path = lambda trial: folder / "trials" / f"{trial.number:04d}.json"
  plan = [
    trials.Trial(
      i, only[i % len(only)],
      _CONFIGS.value[(i + i // len(only)) % len(_CONFIGS.value)],
    )
    for i in range(_KILLS.value)
  ]  # fmt: skip
  open_ = [trial for trial in plan if not path(trial).exists()]
  wholes = _wholes(place, open_)
  (folder / "trials").mkdir(exist_ok=True)
  pool = concurrent.futures.ThreadPoolExecutor(_JOBS.value)
  try:
    futures = [
      pool.submit(trials.run, place, trial, wholes[trial.whole])
      for trial in open_
    ]
    for future in concurrent.futures.as_completed(futures):
      result = future.result()
      files.write_json(path(trials.of(result)), result)
      command.say(f"{result['number'] + 1}/{_KILLS.value} {_told(result)}")
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    scene.stop()
    pool.shutdown()  # The folder stays locked until then.
  return [files.read_json(path(trial)) for trial in plan]


def _wholes(place: Any, open_: list[Any]) -> dict[Any, Any]:
  """The runs that nothing is done to, of some trials."""
  from experiments.faults import trials

  found = {}
  for trial in open_:
    if trial.whole not in found:
      config, skipped = trial.whole
      command.say(f"{config}: an undisturbed run")
      found[trial.whole] = trials.whole(place, config, skipped=skipped)
  return found


def _told(result: dict[str, Any]) -> str:
  done = ", ".join(result["done"])
  what = result["why"] or " / ".join(result["sentences"])
  parts = [f"{result['kind']} ({done}), {result['config']}", result["outcome"]]
  return ": ".join([*parts, what] if what else parts)


def _report(folder: pathlib.Path, results: list[dict[str, Any]]) -> int:
  from experiments.faults import trials
  from nl_jax.train import environment, files

  wrong = [r for r in results if r["outcome"] == trials.WRONG]
  path = folder / RESULT
  about = {"seed": _SEED.value, **environment.describe()}
  files.write_json(path, {"about": about, "trials": results})
  print(trials.table(results))
  print(f"results: {path}")
  for result in wrong:
    print(f"wrong: {result['folder']}: {result['kind']}: {result['why']}")
  return command.PARTLY_FAILED if wrong else command.DONE


if __name__ == "__main__":
  command.run(main)
