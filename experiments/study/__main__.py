"""Trains the runs of a study, several at a time, and tells what they show.

    python -m experiments.study --name=tiny_table
    python -m experiments.study --name=topics --jobs=2
    python -m experiments.study --name=streams

Each run is `experiments.lm` in a folder of its own, at seeds 0, 1, 2; what is
finished is kept, and the same command resumes. Prints a table in Markdown and
writes it with a picture beside the runs. --smoke takes seconds, and shows that
everything works; its figures mean nothing.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import threading

from absl import flags

from experiments.cli import command as command_lib

_NAME = flags.DEFINE_enum(
  "name", None, ["tiny_table", "topics", "streams"], "Which study."
)
_FOLDER = flags.DEFINE_string("folder", "runs/studies", "Folder of the runs.")
_JOBS = flags.DEFINE_integer(
  "jobs", 0, "Runs at a time; 0: one for each two cores.", lower_bound=0
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs a row.", lower_bound=1)
_ROWS = flags.DEFINE_list("rows", [], "Only these rows.")
_SMOKE = flags.DEFINE_boolean("smoke", False, "The test size, in seconds.")


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    row: name in the table.
    config: named config.
    overrides: fields of it, as they stand on a command line.
    seed: of weights and data order.
    folder: its workdir.
  """

  row: str
  config: str
  overrides: tuple[str, ...]
  seed: int
  folder: pathlib.Path

  def command(self) -> list[str]:
    """The command that trains it, or continues."""
    return [
      sys.executable, "-m", "experiments.lm", f"--config={self.config}",
      *(f"--config.{x}" for x in self.overrides),
      f"--config.train.seed={self.seed}", f"--config.data.seed={self.seed}",
      f"--workdir={self.folder}",
    ]  # fmt: skip

  @property
  def done(self) -> bool:
    """Whether it was trained to its end."""
    return (self.folder / "results.json").exists()


def _train(runs: list[Run], jobs: int) -> list[Run]:
  """Trains what is not done; returns what failed."""
  cores = sorted(os.sched_getaffinity(0))
  places = [cores[i::jobs] for i in range(jobs)]
  told, free = threading.Lock(), list(places)
  # As `python -m` has it here, from whatever folder this was started.
  paths = [str(pathlib.Path(__file__).parents[2]), os.getenv("PYTHONPATH", "")]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
  waiting = [run for run in runs if not run.done]

  def one(run: Run) -> Run | None:
    with told:
      place = free.pop()
      command_lib.say(f"{run.row}, seed {run.seed}: training ...")
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "study.log").open("ab") as log:
      process = subprocess.Popen(run.command(), stdout=log, stderr=log, env=env)
      # Runs at a time must not share cores: XLA takes all it is given, but
      # not before it was imported.
      os.sched_setaffinity(process.pid, place)
      status = process.wait()
    with told:
      free.append(place)
      word = "done" if not status else f"failed, see {run.folder}/study.log"
      command_lib.say(f"{run.row}, seed {run.seed}: {word}")
    return run if status else None

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    results = list(pool.map(one, waiting))
  return [run for run in results if run]


def main() -> int:
  """Runs the command; returns its exit status."""
  if not _NAME.value:
    raise ValueError("--name is required: tiny_table, topics or streams")
  from experiments.study import studies

  size = "smoke" if _SMOKE.value else ""
  folder = pathlib.Path(_FOLDER.value) / _NAME.value / size
  study = studies.STUDIES[_NAME.value](_SMOKE.value, folder)
  unknown = [name for name in _ROWS.value if name not in study.rows]
  if unknown:
    raise ValueError(
      f"unknown row {unknown[0]!r}; known: {', '.join(study.rows)}"
    )
  rows = _ROWS.value or list(study.rows)
  seeds = range(min(_SEEDS.value, 2) if _SMOKE.value else _SEEDS.value)
  # Seed by seed, so that a table of all rows is there early.
  runs = [
    Run(row, *study.rows[row], seed, folder / f"{row}_seed{seed}")
    for seed, row in itertools.product(seeds, rows)
  ]
  jobs = _JOBS.value or max(len(os.sched_getaffinity(0)) // 2, 1)
  command_lib.say(
    f"{len(runs)} runs, {sum(run.done for run in runs)} of them done, in "
    f"{folder}"
  )
  study.prepare()
  failed = _train(runs, min(jobs, len(os.sched_getaffinity(0))))
  print(studies.tell(folder))
  return command_lib.PARTLY_FAILED if failed else command_lib.DONE


if __name__ == "__main__":
  command_lib.run(main)
