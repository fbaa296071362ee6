"""Tables of recall, languages and needles, published numbers beside ours."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.tasks import problems
from nl_jax.tasks import published

Trials = Sequence[Mapping[str, Any]]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mqar(trials: Trials, size: problems.Sizes) -> str:
  """Accuracy at the labelled positions, by length and pairs."""
  names = [problems.mqar_test(*setting) for setting in problems.settings(size)]
  trained = [name for name in names if name.endswith(f" {size.lengths[0]}")]
  score = lambda trial: statistics.fmean(
    trial["history"][-1][f"{name}/position"] for name in trained
  )
  rows = []
  for arm, runs in _best(trials, score):
    shares = {
      name: [run["history"][-1][f"{name}/position"] for run in runs]
      for name in names
    }
    rows.append(
      [arm, _count(runs[0]["parameters"]), f"{runs[0]['learning_rate']:g}"]
      + [_steps(run["history"][-1]["step"] for run in runs), str(len(runs))]
      + [_mean(shares[name]) for name in names]
    )
  head = ["model", "parameters", "rate", "steps", "seeds"]
  head += [f"{n} pairs in {t}" for t, n in problems.settings(size)]
  return (
    f"### MQAR\n\nAccuracy (%) of the queries, mean over seeds (lowest to "
    f"highest). Vocabulary {size.vocab_size}, length {size.lengths[0]} trained "
    f"with {_and(size.pairs)} pairs mixed, {size.train:,} rows of each, "
    f"{size.test} test rows; at most {size.steps:,} steps of {size.batch_size} "
    f"rows, stopped above {100 * problems.SOLVED:.0f} %. Published for HOPE: "
    "none.\n\n" + markdown(head, rows)
  )


def formal(trials: Mapping[str, Trials], size: problems.Sizes) -> str:
  """Both choices among the tests of each run, a table each.

  Args:
    trials: by language.
    size: of them.
  """
  intro = (
    f"### Formal languages\n\nStrings (%) of which every class is right, Bin 0 "
    f"/ Bin 1 (longer than trained). {size.train:,} strings to learn from, at "
    f"most {size.test} a bin; at most {size.steps:,} steps of "
    f"{size.batch_size}.\n\n"
  )
  style = (
    "As the published table: of each run the test with the best Bin 1, of the "
    "seeds the best.\n\n"
  )
  honest = (
    "\n\nHonestly: the test is chosen by Bin 0 alone; mean over seeds.\n\n"
  )
  return (
    intro + style + _formal(trials, problems.on_bin1, max, with_published=True)
    + honest + _formal(trials, problems.on_bin0, statistics.fmean)
  )  # fmt: skip


def _formal(
  trials: Mapping[str, Trials],
  choose: Callable[[list[dict]], Mapping[str, Any]],
  over_seeds: Callable[[Iterable[float]], float],
  *,
  with_published: bool = False,
) -> str:
  cells: dict[str, dict[str, str]] = {}
  seeds: dict[str, int] = {}
  key = lambda trial: tuple(
    choose(trial["history"])[f"{b}/sequence"] for b in ("bin1", "bin0")
  )
  for name, runs_of_name in trials.items():
    for arm, runs in _best(runs_of_name, lambda trial: sum(key(trial))):
      if over_seeds is max:
        runs = [max(runs, key=key)]
      chosen = [choose(run["history"]) for run in runs]
      bins = [
        100 * statistics.fmean(c[f"{b}/sequence"] for c in chosen)
        for b in ("bin0", "bin1")
      ]
      text = " / ".join(
        f"{x:.0f}" if x in (0, 100) else f"{x:.1f}" for x in bins
      )
      cells.setdefault(arm, {})[name] = text
      seeds[arm] = max(
        seeds.get(arm, 0),
        len({r["seed"] for r in runs_of_name if r["arm"] == arm}),
      )
  rows = [
    [arm, str(seeds[arm]), *(found.get(name, "") for name in trials)]
    for arm, found in cells.items()
  ]
  if with_published:
    rows += [
      [f"*{row['model']}, published*", ""]
      + [_published(row, n) for n in trials]
      for row in published.rows(published.LANGUAGES)
    ]
  return markdown(["model", "seeds", *trials], rows)


def _published(row: Mapping[str, str], name: str) -> str:
  if f"{name}0" not in row:
    return ""
  return f"{row[f'{name}0']} / {row[f'{name}1']}"


def _best(
  trials: Trials, score: Callable[[Mapping[str, Any]], float]
) -> list[tuple[str, list[Mapping[str, Any]]]]:
  """(arm, its runs at the rate that is best on average), in order of arms."""
  found: dict[str, dict[float, list]] = {}
  for trial in trials:
    rates = found.setdefault(trial["arm"], {})
    rates.setdefault(trial["learning_rate"], []).append(trial)
  mean = lambda runs: statistics.fmean(map(score, runs))
  return [(arm, max(rates.values(), key=mean)) for arm, rates in found.items()]


def _mean(shares: Sequence[float]) -> str:
  mean = f"{100 * statistics.fmean(shares):.1f}"
  if len(shares) == 1:
    return mean
  return f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def _steps(steps: Iterable[int]) -> str:
  known = sorted(set(steps))
  ends = known if len(known) == 1 else (known[0], known[-1])
  return " to ".join(f"{x:,}" for x in ends)


def _count(parameters: int) -> str:
  return f"{parameters / 1e6:.3f}M"


def _and(numbers: Sequence[int]) -> str:
  return ", ".join(map(str, numbers))


def needles(result: Mapping[str, Any]) -> str:
  """Cells of a run, and published scores where there are some."""
  task, about = result["task"], result["about"]
  lengths = sorted({cell["length"] for cell in result["cells"]})
  rows = [
    [
      f"{cell['length']:,}",
      "drawn" if cell["depth"] is None else f"{cell['depth']:g} %",
      f"{100 * cell['match']:.1f} ± {100 * cell['match_standard_error']:.1f}",
      f"{100 * cell['forced']:.1f}",
      f"{cell['nats']:.3f}",
    ]
    for cell in result["cells"]
  ]
  head = ["tokens", "depth", "found (%)", "forced (%)", "nat per token"]
  text = (
    f"### {task}\n\n{about['model']['arch']} at step {about['model']['step']}, "
    f"trained at {about['model']['trained_length']} tokens; "
    f"{about['samples']} questions a cell, haystack: "
    f"{about['haystack']['text']}.\n\n" + markdown(head, rows)
  )
  known = {t: scores for t in lengths if (scores := published.ruler(task, t))}
  if not known:
    return text + "\n\nPublished at these lengths: none."
  models = list(next(iter(known.values())))
  table = markdown(
    ["published", *(f"{t:,}" for t in known)],
    [[name, *(known[t][name] for t in known)] for name in models],
  )
  return (
    f"{text}\n\nPublished (models of some 50B tokens, depths drawn, other key "
    f"words and essays: not comparable):\n\n{table}"
  )
