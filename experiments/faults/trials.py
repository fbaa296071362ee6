"""Trials: a run, a fault, the rest of the run, and the verdict."""

import dataclasses
import pathlib
import shutil
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.faults import data, judge, kinds
from experiments.faults import scene as scene_lib
from nl_jax.train import files

RESUMED, SENTENCE, WRONG = "resumed", "sentence", "wrong"
_ATTEMPTS = 20  # Moments drawn until one comes before the run's end.
_EVAL_EVERY = 20


class Trial(NamedTuple):
  """One fault of the plan.

  Attributes:
    number: from 0.
    kind: of `kinds.KINDS`.
    config: name of the run's config.
  """

  number: int
  kind: str
  config: str

  @property
  def whole(self) -> tuple[str, bool]:
    """Config, and whether a batch is skipped, of the run it must equal."""
    return self.config, self.kind == kinds.SKIPPED


def of(result: Mapping[str, Any]) -> Trial:
  """The trial of a result."""
  return Trial(*(result[name] for name in Trial._fields))


class Whole(NamedTuple):
  """An undisturbed run.

  Attributes:
    record: what it left.
    pace: how fast it was.
  """

  record: judge.Record
  pace: scene_lib.Pace


@dataclasses.dataclass(frozen=True)
class Place:
  """The folder of all trials.

  Attributes:
    folder: with the corpus, the compiled programs and the whole runs.
    seed: of all that is random.
  """

  folder: pathlib.Path
  seed: int

  def arguments(self, config: str, corpus: pathlib.Path) -> list[str]:
    """Flags of `experiments.lm`, but for the workdir."""
    values = {
      "data.source": "prepared",
      "data.path": corpus / data.SHARDS,
      "train.steps": scene_lib.STEPS,
      "train.log_every": 1,
      "train.eval_every": _EVAL_EVERY,
      "eval.batches": 1,
      "checkpoint.every": scene_lib.EVERY,
    }
    return [
      f"--config={config}",
      *(f"--config.{key}={value}" for key, value in values.items()),
      f"--compilation_cache={self.folder / 'compiled'}",
    ]

  @property
  def corpus(self) -> pathlib.Path:
    """Text and shards of the runs whose data nothing is done to."""
    return self.folder / "corpus"


def whole(place: Place, config: str, *, skipped: bool) -> Whole:
  """A run that nothing is done to, made where it is not there.

  It is made twice, the second time with compiled programs: that gives the pace.

  Args:
    place: of the trials.
    config: its name.
    skipped: with the batch that `kinds.SKIPPED` skips.

  Raises:
    ValueError: it fails, or the second is not as the first.
  """
  name = config.replace(":", "_") + ("_skipped" if skipped else "")
  folder = place.folder / "whole" / name
  note = folder / "pace.json"
  if note.exists():
    pace = scene_lib.Pace(**files.read_json(note))
    return Whole(judge.read(folder / "first" / "run"), pace)
  shutil.rmtree(folder, ignore_errors=True)
  records = []
  for part in ("first", "second"):
    scene = scene_lib.Scene(
      folder / part, place.corpus, place.arguments(config, place.corpus),
      scene_lib.Pace(0, 0, 0), np.random.default_rng(0),
    )  # fmt: skip
    ended = _finish(scene, skipped)
    if ended.status:
      last = ended.said.strip().rpartition("\n")[2]
      raise ValueError(f"an undisturbed run of {config} failed: {last}")
    records.append(judge.read(scene.workdir))
  if found := judge.differences(*records):
    raise ValueError(
      "two undisturbed runs differ, so nothing can be "
      f"judged: {judge.told(found)}"
    )
  pace = _pace(scene.workdir, ended.seconds, ended.begun)
  files.write_json(note, pace._asdict())
  return Whole(records[0], pace)


def _pace(
  workdir: pathlib.Path, seconds: float, begun: float
) -> scene_lib.Pace:
  times = [line["wall_time"] for line in scene_lib.read_lines(workdir)]
  # Clocks of the day may be set back: no wait is negative.
  return scene_lib.Pace(
    start=max(0.0, times[0] - begun),
    step=max(0.0, times[-1] - times[0]) / scene_lib.STEPS,
    end=max(0.0, begun + seconds - times[-1]),
  )


def _finish(scene: scene_lib.Scene, skipped: bool) -> scene_lib.Ended:
  """The last start of a run."""
  more = (kinds.POISON, kinds.SKIP) if skipped else ()
  with scene.start(*more) as start:
    return start.wait()


def run(place: Place, trial: Trial, unhurt: Whole) -> dict[str, Any]:
  """Does one trial.

  Args:
    place: of the trials.
    trial: which.
    unhurt: the run that it must equal.

  Returns:
    A JSON object: trial, outcome, why it is wrong, and figures. The folder of a
    trial that went wrong is kept; its path is in "folder".
  """
  folder = place.folder / "trials" / f"{trial.number:04d}"
  for attempt in range(_ATTEMPTS):
    shutil.rmtree(folder, ignore_errors=True)
    # The data of a trial may be hurt: its own.
    corpus = pathlib.Path(shutil.copytree(place.corpus, folder / "corpus"))
    rng = np.random.default_rng([place.seed, trial.number, attempt])
    arguments = place.arguments(trial.config, corpus)
    scene = scene_lib.Scene(folder, corpus, arguments, unhurt.pace, rng)
    try:
      result = _judged(scene, trial, unhurt)
    except scene_lib.MissedError:
      continue
    break
  else:
    raise ValueError(
      f"{trial.kind}: {_ATTEMPTS} runs were done before the moment of their "
      "fault came; start the same command again"
    )
  if result["outcome"] == WRONG:
    for i, ended in enumerate(scene.ended):
      (folder / f"said_{i}.txt").write_text(ended.said, encoding="utf-8")
    result["folder"] = str(folder)
  else:
    shutil.rmtree(folder)
  return result


def _judged(
  scene: scene_lib.Scene, trial: Trial, unhurt: Whole
) -> dict[str, Any]:
  """Hurts a run, has it end, and compares it."""
  figures: Mapping[str, Any] = {}
  why = ""
  try:
    kinds.KINDS[trial.kind](scene)
    with scene.start(*_last(trial.kind)) as start:
      ended = scene.end(start, (0,))
    figures = lost(scene, ended)
    if figures["resumed_from"] < scene.marks[-1].promised:
      raise scene_lib.WrongError(
        f"resumed from step {figures['resumed_from']}; the checkpoint of step "
        f"{scene.marks[-1].promised} was whole"
      )
    if found := judge.differences(unhurt.record, judge.read(scene.workdir)):
      raise scene_lib.WrongError(judge.told(found))
  except (scene_lib.WrongError, ValueError, OSError) as error:
    why = str(error)
  outcome = WRONG if why else SENTENCE if scene.sentences else RESUMED
  return {
    **trial._asdict(),
    "outcome": outcome,
    "why": why,
    "done": scene.done,
    "statuses": [ended.status for ended in scene.ended],
    "sentences": scene.sentences,
    **figures,
  }


def _last(kind: str) -> tuple:
  return (kinds.POISON, kinds.SKIP) if kind == kinds.SKIPPED else ()


def lost(scene: scene_lib.Scene, ended: scene_lib.Ended) -> dict[str, Any]:
  """What the last blow cost.

  Args:
    scene: whose run is done.
    ended: its last start.

  Returns:
    {"resumed_from", "steps_lost": made before and made again, "seconds_lost":
    from the blow until the last start was further than before, or done; None
    where no step was left to it}.
  """
  mark, begun_at = scene.marks[-1], scene_lib.begun_at(ended.said)
  further = min(mark.step + 1, scene_lib.STEPS)
  # Of the last start: a run that is stopped makes one more step.
  later = [
    max(0.0, line["wall_time"] - mark.time)
    for line in scene_lib.read_lines(scene.workdir)
    if line["step"] >= further and line["wall_time"] > ended.begun
  ]
  return {
    "resumed_from": begun_at,
    "steps_lost": max(0, mark.step - begun_at),
    "seconds_lost": round(min(later), 2) if later else None,
  }


def table(results: list[dict[str, Any]]) -> str:
  """Markdown: a line a kind, and one for all."""
  rows = [
    "| fault | times | resumed by itself, bit-equal | one sentence, then "
    "bit-equal | wrong | steps made again: median, most | seconds lost: "
    "median, most |",
    "|---|---|---|---|---|---|---|",
  ]
  names = [k for k in kinds.KINDS if any(r["kind"] == k for r in results)]
  for name in names:
    rows.append(_row(name, [r for r in results if r["kind"] == name]))
  rows.append(_row("all", results))
  return "\n".join(rows)


def _row(name: str, results: list[dict[str, Any]]) -> str:
  counts = [
    sum(r["outcome"] == outcome for r in results)
    for outcome in (RESUMED, SENTENCE, WRONG)
  ]
  cells = [name, len(results), *counts]
  for key, form in (("steps_lost", "{:.0f}"), ("seconds_lost", "{:.1f}")):
    values = [r[key] for r in results if r.get(key) is not None]
    both = (statistics.median(values), max(values)) if values else ()
    cells.append(", ".join(form.format(v) for v in both) or "-")
  return "| " + " | ".join(str(cell) for cell in cells) + " |"
