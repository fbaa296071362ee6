"""Compares optimizers, honestly and resumably (docs/results_optimizers.md).

    python -m experiments.optimizers --suite={lm,start,topics,toys} [--full]
                                     [--folder=runs/optimizers] [--table=FILE]

One JSON file a trial lies in the folder: a trial that is there is not run
again, so a killed command resumes where it stopped. First every arm at every
rate with one seed, and up to two rates further while the best is at an edge;
then three seeds at its best rate. `--full` is the whole grid: all arms, two
more rates, every b1, three seeds. The suite `start` is the public optimizers at
their defaults and the rates to start with, three seeds each, on the byte model
of `lm`. `--table` writes the page from what is in the folder.
"""

import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from experiments.cli import command as command_lib
from experiments.optimizers import page
from nl_jax import files

_SUITE = flags.DEFINE_enum(
  "suite", "lm", ["lm", "start", "topics", "toys"], "Which."
)
_FULL = flags.DEFINE_bool("full", False, "The full grid: many hours.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps, to see it run.")
_FOLDER = flags.DEFINE_string("folder", "runs/optimizers", "Results, as JSON.")
_TABLE = flags.DEFINE_string("table", "", "Write the tables (Markdown) here.")
_SEEDS = (0, 1, 2)
_EXTENSIONS = 2  # Rates tried beyond the grid while the best is at its edge.


def _trial_path(folder: pathlib.Path, trial: dict) -> pathlib.Path:
  arm = "".join(c if c.isalnum() else "_" for c in trial["arm"])
  name = f"{arm}-lr{trial['rate']:g}-b{trial['b1']:g}-s{trial['seed']}.json"
  return folder / name


def _save(path: pathlib.Path, content: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, json.dumps(content))


def _run_trial(
  folder: pathlib.Path, trial: dict, run: Callable[..., dict]
) -> dict:
  path = _trial_path(folder, trial)
  if path.exists():
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("text") != trial["text"]:
      raise ValueError(
        f"{path} is of another text ({found.get('text', 'not said')}) than "
        f"that of this version ({trial['text']}), and figures of two texts do "
        "not compare; give another --folder"
      )
    return found
  begin = time.perf_counter()
  result = run(trial["arm"], trial["rate"], trial["b1"], trial["seed"])
  result |= trial | {"seconds": time.perf_counter() - begin}
  _save(path, result)
  shown = {k: v for k, v in result.items() if isinstance(v, float)}
  text = ", ".join(f"{k} {v:.4g}" for k, v in shown.items())
  print(f"{trial['arm']}, seed {trial['seed']}: {text}", flush=True)
  return result


def _compare(
  folder: pathlib.Path, text: str, names: Iterable[str],
  run: Callable[..., dict], full: bool, seeds: tuple[int, ...],
  extensions: int = _EXTENSIONS,
) -> None:  # fmt: skip
  from experiments.optimizers import arms

  for name in names:
    arm = arms.ARMS[name]
    rates, b1s = arm.rates, (arm.b1,)
    if full:
      rates = (rates[0] / 10**0.5, *rates, rates[-1] * 10**0.5)
      b1s = arms.B1S
    grid = [
      dict(arm=name, rate=float(f"{rate:.3g}"), b1=b1, seed=seed, text=text)
      for rate, b1, seed in itertools.product(
        rates, b1s, seeds if full else seeds[:1]
      )
    ]
    results = [_run_trial(folder, trial, run) for trial in grid]
    best = min(results, key=page.value)
    for _ in range(extensions):
      rate = _beyond(best["rate"], [result["rate"] for result in results])
      if rate is None:
        break
      results.append(_run_trial(folder, {**_key(best), "rate": rate}, run))
      best = min(results, key=page.value)
    for seed in seeds:
      _run_trial(folder, {**_key(best), "seed": seed}, run)


def _run_starts(
  folder: pathlib.Path,
  text: str,
  run: Callable[..., dict],
  seeds: tuple[int, ...],
  count: int | None,
) -> None:
  """The first `count` of STARTS, seed by seed: a table is there early."""
  from experiments.optimizers import arms

  rows = [(x, b1) for x, arm in arms.STARTS.items() for b1 in arm.b1s]
  for seed, (name, b1) in itertools.product(seeds, rows[:count]):
    rate = arms.STARTS[name].rate
    trial = dict(arm=name, rate=rate, b1=b1, seed=seed, text=text)
    _run_trial(folder, trial, run)


def _key(trial: dict) -> dict:
  """What names a trial."""
  return {k: trial[k] for k in ("arm", "rate", "b1", "seed", "text")}


def _beyond(best: float, rates: Iterable[float]) -> float | None:
  """The next rate where the best one is at the edge of those tried."""
  low, high = min(rates), max(rates)
  if low < best < high:
    return None
  factor = 10**0.5 if best == high else 10**-0.5
  return float(f"{best * factor:.1g}")


def _run_toys(folder: pathlib.Path, smoke: bool) -> None:
  from experiments.optimizers import toys as toys_lib

  for name, problem in toys_lib.PROBLEMS.items():
    path = folder / f"{name}.json"
    if path.exists():
      continue
    rows = problem(20) if smoke and name == "curved_valley" else problem()
    _save(path, {"rows": rows})
    for row in rows:
      print(row, flush=True)


def main() -> int:
  """Runs the command; returns its exit status."""
  smoke, full = _SMOKE.value, _FULL.value
  # Never beside the real trials, which it would stand in for.
  folder = pathlib.Path(_FOLDER.value) / ("smoke" if smoke else "")
  if smoke and full:
    raise ValueError("give --smoke or --full, not both")
  if full and _SUITE.value in ("start", "toys"):
    raise ValueError(f"--suite={_SUITE.value} has no --full: it is one size")
  if _SUITE.value == "toys":
    _run_toys(folder / "toys", smoke)
  else:
    from experiments.optimizers import arms
    from experiments.optimizers import language_model as lm

    if _SUITE.value != "topics":
      names = tuple(arms.ARMS) if full else arms.SHORT
      text = lm.corpus()[1]
      sizes = (4, 16) if smoke else (300, 256)
      run = lambda *args: lm.run_lm(*args, *sizes)
    else:
      names = tuple(arms.ARMS) if full else arms.TOPICS
      text = lm.topics()[1]
      sizes = (2, 16) if smoke else (60, 64)
      run = lambda *args: lm.run_topics(*args, *sizes)
    seeds = _SEEDS[:2] if smoke else _SEEDS
    names = names[:2] if smoke else names
    further = 0 if smoke else _EXTENSIONS
    print(text, flush=True)
    into = folder / _SUITE.value
    if _SUITE.value == "start":
      _run_starts(into, text, run, seeds, 1 if smoke else None)
    else:
      _compare(into, text, names, run, full, seeds, further)
  if _TABLE.value:
    path = pathlib.Path(_TABLE.value)
    plot = path.with_suffix(".png")
    path.write_text(page.page(folder, plot), encoding="utf-8")
    print(f"wrote {path}")
  return command_lib.DONE


if __name__ == "__main__":
  command_lib.run(main)
