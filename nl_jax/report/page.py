"""The page of a report: one HTML file that needs nothing else."""

import html
import re
from collections.abc import Iterable
from typing import Any

from nl_jax.report import charts
from nl_jax.report import runs as runs_lib

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2428; --soft: #66707a;
  --line: #d9dee3; --page: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a2ad;
  --line: #343b43; --page: #14171a; --card: #1c2025; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.2rem 4rem; max-width: 78rem;
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--card);
  border-radius: 8px; }
figure svg { width: 100%; height: auto; display: block; }
pre { background: var(--card); padding: .8rem; border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; }
summary { cursor: pointer; }
"""


def page(
  runs: list[runs_lib.Run],
  shown: list[charts.Panel],
  cards: list[str],
) -> str:
  """The HTML of a report.

  Args:
    runs: what to show, the first one first.
    shown: the charts.
    cards: the level card of each run as text, or why there is none.
  """
  title = " · ".join(run.name for run in runs)
  sections = [
    f"<h1>{_text(title)}</h1>",
    *(
      f"<p class=soft>{_text(line)}</p>"
      for line in [*_of_all(runs), *(x for run in runs for x in _notes(run))]
    ),
    "<h2>Figures</h2>",
    _table(("", *(run.name for run in runs)), _figures(runs)),
    "<h2>Charts</h2>",
    '<div class="charts">',
    *(_chart(panel, i) for i, panel in enumerate(shown)),
    "</div>",
    *_cards(runs, cards),
    *_samples(runs),
    *_configs(runs),
    *_environments(runs),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
    + "\n".join(sections)
    + "\n</body></html>\n"
  )


def _of_all(runs: list[runs_lib.Run]) -> Iterable[str]:
  """What must be known before runs are compared."""
  groups = runs_lib.by_tokenizer(runs)
  if len(groups) > 1:
    yield (
      f"These runs have {len(groups)} tokenizers, so their losses in nat per "
      "token stand in panels of their own. Nat per byte can be compared where "
      "the held-out text is the same."
    )


def _notes(run: runs_lib.Run) -> Iterable[str]:
  """What a reader must know before the figures."""
  step = run.lines[-1]["step"]
  steps = run.config.get("train", {}).get("steps", "?")
  if not run.results:
    yield f"{run.name} is not done: step {step} of {steps}."
  for i, told in enumerate(run.chain):
    yield f"{run.name} {'came' if i == 0 else '… then'} {told}."
  for step, change in run.changes:
    yield f"{run.name} changed at step {step}: {change}."
  if run.not_finite():
    yield (
      f"{run.name}: {run.not_finite()} logged steps were not finite; they are "
      "gaps in the charts."
    )
  if run.torn:
    yield f"{run.name}: {run.torn} torn lines of metrics were left out."


def _figures(runs: list[runs_lib.Run]) -> list[tuple[str, ...]]:
  """Rows of the table of final figures; those that no run has are left out."""
  keys = (
    ("validation, nat per byte", "eval/validation/nat_per_byte", "{:.4f}"),
    ("validation, nat per token", "eval/validation/loss", "{:.4f}"),
    ("train, nat per token (last logged)", "train/loss", "{:.4f}"),
    ("tokens per second (last logged)", "perf/tokens_per_s", "{:,.0f}"),
    ("memory of the host at most, GiB", "perf/peak_memory_gib", "{:.2f}"),
    ("steps skipped", "skipped", "{:.0f}"),
  )
  rows = [
    ("steps", *(f"{run.lines[-1]['step']:,}" for run in runs)),
    ("tokens", *(f"{run.lines[-1]['tokens']:,}" for run in runs)),
    ("seconds of training", *(f"{run.seconds()[-1]:,.0f}" for run in runs)),
  ]
  for label, key, form in keys:
    values = [run.last(key) for run in runs]
    if any(value is not None for value in values):
      cells = ["–" if v is None else form.format(v) for v in values]
      rows.append((label, *cells))
  return rows


def _chart(panel: charts.Panel, number: int) -> str:
  label = f"Chart: {panel.title}, {len(panel.curves)} curves over {panel.x}"
  # Names inside the drawings must differ from those of the other drawings.
  drawing = re.sub(
    r'(id="|href="#|url\(#)', rf"\g<1>c{number}-", charts.svg(panel)
  )
  drawing = drawing.replace(
    "<svg", f'<svg role="img" aria-label="{_text(label)}"', 1
  )
  return f"<figure>{drawing}</figure>"


def _cards(runs: list[runs_lib.Run], cards: list[str]) -> Iterable[str]:
  yield "<h2>Levels</h2>"
  yield (
    '<p class="soft">What learns, from what, and how often: chunk and BPTT '
    "length in tokens, frequency in updates per update of the slowest level, "
    "state of one sequence.</p>"
  )
  for run, card in zip(runs, cards):
    if len(runs) > 1:
      yield f"<p><b>{_text(run.name)}</b></p>"
    lines = [re.split(r"\s{2,}", line.strip()) for line in card.splitlines()]
    if len(lines) > 1 and len({len(line) for line in lines}) == 1:
      yield _table(lines[0], lines[1:])
    else:
      yield f"<pre>{_text(card)}</pre>"


def _samples(runs: list[runs_lib.Run]) -> Iterable[str]:
  if any(run.sample for run in runs):
    yield "<h2>Sample</h2>"
  for run in runs:
    if run.sample:
      if len(runs) > 1:
        yield f"<p><b>{_text(run.name)}</b></p>"
      yield f"<pre>{_text(run.sample)}</pre>"


def _configs(runs: list[runs_lib.Run]) -> Iterable[str]:
  flat = [runs_lib.flat(run.config) for run in runs]
  keys = sorted({key for values in flat for key in values})
  shown = {
    key: [repr(v[key]) if key in v else "–" for v in flat] for key in keys
  }
  header = ("field", *(run.name for run in runs))
  yield "<h2>Config</h2>"
  if len(runs) > 1:
    differing = [(k, *v) for k, v in shown.items() if len(set(v)) > 1]
    yield f"<p>{len(differing)} fields differ.</p>"
    yield _table(header, differing)
  yield "<details><summary>All fields</summary>"
  yield _table(header, [(k, *v) for k, v in shown.items()])
  yield "</details>"


def _environments(runs: list[runs_lib.Run]) -> Iterable[str]:
  names = sorted({n for r in runs for n in r.environment.get("versions", {})})
  rows = [
    (n, *(r.environment.get("versions", {}).get(n, "–") for r in runs))
    for n in names
  ]
  rows.append(("code", *(r.environment.get("git", "")[:12] for r in runs)))
  yield "<h2>Made with</h2>"
  yield _table(("", *(run.name for run in runs)), rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
  head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
  body = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _cells(row: Iterable[Any]) -> Iterable[str]:
  for number, cell in enumerate(row):
    text = _text(cell)
    if not number:
      yield f'<th scope="row">{text}</th>'
    elif re.fullmatch(r"[-\d.,]+", text):
      yield f'<td class="number">{text}</td>'
    else:
      yield f"<td>{text}</td>"


def _text(value: Any) -> str:
  """Escaped; half a character, as in a broken file name, becomes "?"."""
  text = str(value).encode("utf-8", "replace").decode("utf-8")
  return html.escape(text)
