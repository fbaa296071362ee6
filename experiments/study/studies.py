"""The studies of `experiments.study`: their rows, and what is made of them."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.cli import named

Row = tuple[str, tuple[str, ...]]  # A config's name and its changed fields.


@dataclasses.dataclass(frozen=True)
class Study:
  """What is trained, and what is reported.

  Attributes:
    rows: by name.
    tell: (finished runs, folder for a picture) -> a table in Markdown.
    prepare: makes what the runs read, where it is not there.
  """

  rows: dict[str, Row]
  tell: Callable[[Sequence[Any], pathlib.Path], str]
  prepare: Callable[[], None] = lambda: None


def tiny_table(smoke: bool, folder: pathlib.Path) -> Study:
  """All rows of Table 1 at the tiny size, on the embedded corpus."""
  del folder  # Nothing is made for it.
  names = [x for x in named.config_names() if x.endswith("_tiny")]
  if smoke:
    names = ["transformer_tiny", "deltanet_tiny"]
  size = ":smoke" if smoke else ""
  steps = ("train.steps=3", "eval.batches=1") if smoke else ()
  return Study({name: (name + size, steps) for name in names}, _tell_table)


# How levels learn in context; with chunks beyond the text: not at all.
_THREE = (
  "chunks=32,128,512",
  "rates=0.1,0.1,0.1",
  "fast_levels=('high','mid','low')",
)
_TOPIC_ARMS = {
  "plain": ("chunks=(8192,)", "rates=(0.1,)", "fast_levels=('high',)"),
  "levels_1": ("chunks=(32,)", "rates=(0.1,)", "fast_levels=('high',)"),
  "levels_2": ("chunks=32,128", "rates=0.1,0.1", "fast_levels=('high','mid')"),
  "levels_3": _THREE,
  "nested": (*_THREE, "variant=nested"),
  "nested_reptile": (*_THREE, "variant=nested", "nested_meta=reptile"),
}


def topics(smoke: bool, folder: pathlib.Path) -> Study:
  """HOPE-Attention that reads package A, then B, then A again."""
  del folder  # Nothing is made for it.
  from experiments.study import topics as topics_lib

  config = "hope_attention_incontext_tiny" + (":smoke" if smoke else "")
  # Rows as long as a topic of the stream; as many tokens a step as ever.
  size = ("data.sequence_length=1024", "data.batch_size=2")
  if smoke:
    size = ("train.steps=3", "eval.batches=1", "data.source=embedded")
  arms = dict(list(_TOPIC_ARMS.items())[:2]) if smoke else _TOPIC_ARMS
  rows = {
    name: (config, (*size, *(f"model.cms.{x}" for x in arm)))
    for name, arm in arms.items()
  }
  length = 64 if smoke else 1024
  tell = lambda runs, folder: topics_lib.tell(runs, folder, length)
  return Study(rows, tell)


# With what differs; levels in context that are carried end with a document.
_STREAM_MODELS = {
  "hope_linear": (),
  "titans_lmm": (),
  "hope_attention_incontext": ("model.cms.reset=document",),
}


def streams(smoke: bool, folder: pathlib.Path) -> Study:
  """Loss beyond the trained row, trained on packed rows and on streams."""
  from experiments.study import streams as streams_lib

  # The same text for all, a little more than the steps read, so that packed
  # rows and streams are the same tokens, each read at most once.
  length, batch, steps = (64, 8, 3) if smoke else (128, 16, 150)
  text = folder / "text.jsonl"
  size = (
    "data.source=jsonl", f"data.path={text}", f"data.sequence_length={length}",
    f"data.batch_size={batch}", f"train.steps={steps}", "train.eval_every=0",
    f"eval.batches={1 if smoke else 8}",
  )  # fmt: skip
  models = {"deltanet": ()} if smoke else _STREAM_MODELS
  rows = {
    f"{model}_{arm}": (
      f"{model}_tiny" + (":smoke" if smoke else ""),
      (*size, f"data.rows={arm}", *more),
    )
    for model, more in models.items()
    for arm in streams_lib.ARMS
  }
  return Study(
    rows,
    lambda runs, where: streams_lib.tell(runs, where, length),
    lambda: streams_lib.write_text(text, length * batch * steps * 6 // 5),
  )


STUDIES = {"tiny_table": tiny_table, "topics": topics, "streams": streams}


class Finished(NamedTuple):
  """A run that was trained to its end.

  Attributes:
    row: name in the table.
    seed: of weights and data order.
    folder: its workdir.
  """

  row: str
  seed: int
  folder: pathlib.Path


def finished(folder: pathlib.Path) -> list[Finished]:
  """The runs of a study's folder that were trained to their end.

  Raises:
    ValueError: there are none.
  """
  found = []
  for path in sorted(folder.glob("*_seed*/results.json")):
    row, _, seed = path.parent.name.rpartition("_seed")
    found.append(Finished(row, int(seed), path.parent))
  if not found:
    raise ValueError(
      f"no run in {folder} was trained to its end: `python -m "
      "experiments.study` trains them"
    )
  return found


def tell(folder: pathlib.Path) -> str:
  """The table of the study in `folder`, written there beside its picture.

  Raises:
    ValueError: no study of a known name, or no run trained to its end.
  """
  smoke = folder.name == "smoke"
  name = (folder.parent if smoke else folder).name
  if name not in STUDIES:
    raise ValueError(
      f"{folder} is not the folder of a study: {', '.join(STUDIES)} expected"
    )
  study, runs = STUDIES[name](smoke, folder), finished(folder)
  runs = [run for row in study.rows for run in runs if run.row == row]
  table = study.tell(runs, folder)
  (folder / "table.md").write_text(table + "\n", encoding="utf-8")
  return table


def by_row(runs: Sequence[Any]) -> dict[str, list[Any]]:
  """Finished runs by the name of their row."""
  groups: dict[str, list[Any]] = {}
  for run in runs:
    groups.setdefault(run.row, []).append(run)
  return groups


def cell(values: Sequence[float], form: str = ".3f") -> str:
  """Mean, and the spread over seeds where there are several."""
  mean = format(statistics.fmean(values), form)
  if len(values) < 2:
    return mean
  return f"{mean} ± {format(statistics.stdev(values), form)}"


def _tell_table(runs: Sequence[Any], folder: pathlib.Path) -> str:
  """The small cousin of Table 1, and a picture of it."""
  import jax

  from nl_jax import build
  from nl_jax.report import charts

  lines = [
    "| config | parameters | state, bytes a sequence | nat per byte | "
    "tokens a second | seeds |",
    "|---|---|---|---|---|---|",
  ]
  rows, losses = [], {}
  for name, group in by_row(runs).items():
    found = [
      json.loads((run.folder / "results.json").read_text()) for run in group
    ]
    _, net = build.of_run(str(group[0].folder))
    params = jax.eval_shape(net.init, jax.random.key(0))
    state = jax.eval_shape(lambda p, net=net: net.init_state(p, 1), params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    loss = [x["metrics"]["eval/validation/nat_per_byte"] for x in found]
    speed = [x["metrics"]["perf/tokens_per_s"] for x in found]
    grows = " (grows)" if net.grows else ""
    losses[name] = loss
    rows.append(
      (
        statistics.fmean(loss),
        f"| `{name}` | {net.parameter_count():,} | {size:,}{grows} | "
        f"{cell(loss)} | {statistics.fmean(speed):,.0f} | {len(group)} |",
      )
    )
  charts.dots(losses, "nat per byte, validation", folder / "table.png")
  return "\n".join([*lines, *(text for _, text in sorted(rows))])
