"""Compares optimizers, honestly and resumably (docs/results_optimizers.md).

    python -m experiments.optimizers --suite={lm,topics,toys} [--full]
                                     [--folder=runs/optimizers] [--table=FILE]

One JSON file a trial lies in the folder: a trial that is there is not run
again, so a killed command goes on where it stopped. First every arm at every
rate with one seed, and up to two rates further while the best is at an edge;
then three seeds at its best rate. `--full` is the whole grid: all arms, two
more rates, every b1, three seeds. `--table` writes the page from what is in the
folder.
"""

import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from experiments.cli import command as command_lib
from nl_jax import files

_SUITE = flags.DEFINE_enum("suite", "lm", ["lm", "topics", "toys"], "Which.")
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


def _value(result: dict) -> float:
  """What is compared: validation, or the online loss; NaN is worst."""
  value = result.get("validation", result.get("online"))
  return value if value == value else float("inf")


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
    best = min(results, key=_value)
    for _ in range(extensions):
      rate = _beyond(best["rate"], [result["rate"] for result in results])
      if rate is None:
        break
      results.append(_run_trial(folder, {**_key(best), "rate": rate}, run))
      best = min(results, key=_value)
    for seed in seeds:
      _run_trial(folder, {**_key(best), "seed": seed}, run)


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


def _load(folder: pathlib.Path) -> list[dict]:
  paths = sorted(folder.glob("*.json"))
  return [json.loads(p.read_text(encoding="utf-8")) for p in paths]


def _best_cells(results: list[dict]) -> list[tuple[dict, list[dict]]]:
  """(an arm's best setting, its runs over seeds), best mean first."""
  cells = {}
  for r in results:
    cells.setdefault((r["arm"], r["rate"], r["b1"]), []).append(r)
  best = {}
  mean = lambda runs: statistics.fmean(map(_value, runs))
  for (arm, *_), runs in cells.items():
    # The cell with most seeds: others were run with the first one alone.
    key = (-len(runs), mean(runs))
    if arm not in best or key < best[arm][0]:
      best[arm] = (key, runs)
  rows = [runs for _, runs in best.values()]
  return sorted(((runs[0], runs) for runs in rows), key=lambda x: mean(x[1]))


def _cell(runs: list[dict], metric: str) -> str:
  values = [r[metric] for r in runs]
  spread = statistics.stdev(values) if len(values) > 1 else float("nan")
  return f"{statistics.fmean(values):.4f} ± {spread:.4f}"


def _table(results: list[dict], metrics: tuple[str, ...]) -> str:
  head = ["arm", "rate", "b1", "seeds", *metrics, "median over the grid"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for setting, runs in _best_cells(results):
    every = [_value(r) for r in results if r["arm"] == setting["arm"]]
    cells = [
      setting["arm"], f"{setting['rate']:g}", f"{setting['b1']:g}",
      str(len(runs)), *(_cell(runs, m) for m in metrics),
      f"{statistics.median(every):.4f}",
    ]  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _toy_tables(results: list[dict]) -> str:
  """One table for each set of columns, in the order of the problems."""
  tables = {}
  for result in results:
    for row in result["rows"]:
      tables.setdefault(tuple(row), []).append(row)
  show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
  parts = []
  for head, rows in tables.items():
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(show(r[k]) for k in head) + " |" for r in rows]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _plot(results: list[dict], path: pathlib.Path) -> bool:
  """Training loss of each arm's best setting; False without matplotlib."""
  try:
    import matplotlib
  except ModuleNotFoundError:
    return False
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4))
  for setting, runs in _best_cells(results):
    curve = [statistics.fmean(x) for x in zip(*(r["curve"] for r in runs))]
    steps = [i * setting["every"] for i in range(len(curve))]
    axes.plot(steps, curve, label=f"{setting['arm']} ({setting['rate']:g})")
  axes.set(xlabel="step", ylabel="training loss, nat per byte", yscale="log")
  axes.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  return True


_INTRO = """# Optimizers compared

Best rate of each arm's own grid, mean ± standard deviation over seeds (weights
and data order together). Lower is better. A difference below the spread over
seeds is none, and one of arms with unequal grids is no evidence. What these
figures do not show is not claimed: see docs/optimizers.md.
"""


def page(folder: pathlib.Path, plot: pathlib.Path) -> str:
  """The page of all results that lie in the folder."""
  parts = [_INTRO]
  command = "python -m experiments.optimizers --suite="
  lm, stream = _load(folder / "lm"), _load(folder / "topics")
  if lm:
    parts.append(
      f"## Byte language model, validation loss in nat per byte\n\n"
      f"`{command}lm`; {_text_of(lm)}.\n\n"
      + _table(lm, ("validation", "seconds"))
    )
    if _plot(lm, plot):
      parts.append(f"![training loss]({plot.name})")
  if stream:
    parts.append(
      f"## Topic stream\n\n`{command}topics`; {_text_of(stream)}.\n"
      "Compare retention at equal online loss only: the rate moves it most.\n\n"
      + _table(stream, ("online", "retention", "forgetting", "recovery"))
    )
  toys = [_load_toy(folder / "toys", n) for n in _toy_names(folder / "toys")]
  if toys:
    parts.append(f"## Toy problems\n\n`{command}toys`\n\n" + _toy_tables(toys))
  return "\n\n".join(parts) + "\n"


def _text_of(results: list[dict]) -> str:
  """What the trials read; all of a folder read the same."""
  return results[0].get("text", "of a text that the trials do not name")


def _toy_names(folder: pathlib.Path) -> list[str]:
  from experiments.optimizers import toys as toys_lib

  return [n for n in toys_lib.PROBLEMS if (folder / f"{n}.json").exists()]


def _load_toy(folder: pathlib.Path, name: str) -> dict:
  return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


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
  if _SUITE.value == "toys":
    _run_toys(folder / "toys", smoke)
  else:
    from experiments.optimizers import arms
    from experiments.optimizers import language_model as lm

    if _SUITE.value == "lm":
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
    _compare(folder / _SUITE.value, text, names, run, full, seeds, further)
  if _TABLE.value:
    path = pathlib.Path(_TABLE.value)
    plot = path.with_suffix(".png")
    path.write_text(page(folder, plot), encoding="utf-8")
    print(f"wrote {path}")
  return command_lib.DONE


if __name__ == "__main__":
  command_lib.run(main)
