"""Speed of mixers and of train steps on one accelerator: a table and a plot.

Each mixer alone, forward and backward, at the width of the 340M models in
bfloat16, beside flash attention; then the train step of five models. Functions
of one length are compiled side by side and timed in turns, and what no longer
fits into the time that was asked for is said and left out. On a CPU `quick`
runs the smallest sizes, to see that everything works; its figures mean nothing.
"""

import concurrent.futures
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

from experiments.cli import command

LENGTHS = (4096, 16384, 2048, 8192)  # The most important first.
TOKENS = 16384  # Of a call of a mixer: rows times length.
MODELS = (
  "transformer", "gated_deltanet", "titans_lmm", "hope_linear", "hope",
)  # fmt: skip
_STEP = (8, 4096)  # Rows and tokens of a train step.
_WORKERS = 6  # Compilations at a time.
_RESERVE = 0.15  # Of the time, kept for what has begun.
BASE = "transformer"


class _Clock:
  """The time that is left of what was asked for."""

  def __init__(self, seconds: float):
    self._end, self._all = time.monotonic() + seconds, seconds

  def spent(self, what: str) -> bool:
    """Whether no time is left for something; says so."""
    if self._end - time.monotonic() > _RESERVE * self._all:
      return False
    command.say(f"no time is left for {what}")
    return True


def run(
  platform: str, least_seconds: Callable, quick: bool, seconds: float,
  output: str,
) -> list[dict]:  # fmt: skip
  """Rows of the table; with `output` also a Markdown table and a picture.

  Args:
    platform: "gpu" or "tpu", what the device must be unless `quick`.
    least_seconds: of `bench`.
    quick: the smallest sizes, on any device.
    seconds: after which nothing new begins.
    output: of the rows; table and picture take its name with .md and .png.

  Raises:
    ValueError: another device, or a file that already exists.
  """
  import jax

  from experiments.bench import peers
  from nl_jax import files

  if not quick and jax.default_backend() != platform:
    raise ValueError(
      f"--suite={platform} needs a {platform.upper()}, got the platform "
      f"{jax.default_backend()!r}; --quick runs its smallest sizes anywhere"
    )
  paths = [pathlib.Path(output).with_suffix(x) for x in (".md", ".png")]
  for path in paths if output else ():
    if path.exists():
      raise ValueError(f"{path} exists: name another --output or remove it")
  clock, rows = _Clock(seconds), []
  for length in (64,) if quick else LENGTHS:
    if not clock.spent(f"mixers at {length:,} tokens"):
      rows += _mixers(length, least_seconds, quick)
  for name in MODELS[:2] if quick else MODELS:
    if not clock.spent(f"the train step of {name}"):
      rows.append(_step(name, least_seconds, quick))
  for row in rows:
    _compare(row, rows)
  if not clock.spent("other libraries"):
    rows += peers.run(least_seconds, functools.partial(_titans, quick), quick)
  if output:
    files.write(paths[0], table(rows))
    _draw(rows, paths[1])
  return rows


def _model(name: str, length: int, rows: int, quick: bool) -> tuple[Any, Any]:
  """(config, model) at the size that is measured."""
  from experiments.cli import named
  from nl_jax import build

  size = "tiny:smoke" if quick else "340m"
  config = named.load_config(f"{name}_{size}")
  with config.unlocked():
    config.train.dtype = "float32" if quick else "bfloat16"
    if not quick:
      config.data.sequence_length, config.data.batch_size = length, rows
  config = build.resolve(config)
  return config, build.model(config)


def _mixers(length: int, least_seconds: Callable, quick: bool) -> list[dict]:
  """Forward and backward of every mixer at one length."""
  from experiments.bench import mixers
  from nl_jax.models import lm

  batch = 1 if quick else max(TOKENS // length, 1)
  rows = [
    dict(kind="mixer", name=name, tokens=length, rows=batch)
    for name in (MODELS if quick else lm.MIXERS)
  ]

  def lowered(name: str) -> tuple[Any, tuple]:
    _, net = _model(name, length, batch, quick)
    grad = mixers.gradient(mixers.one_unit(net), length, batch)
    return grad.func.lower(*grad.args), grad.args

  with concurrent.futures.ThreadPoolExecutor(1 if quick else _WORKERS) as pool:
    # Tracing holds the interpreter, so only compilations run side by side.
    waiting = [
      (row, args, pool.submit(low.compile))
      for row in rows
      for low, args in [lowered(row["name"])]
    ]
  calls = {}
  for row, args, future in waiting:
    compiled = _made(row, future.result)
    if compiled is not None:
      row["gib"] = _gib(compiled)
      calls[row["name"]] = functools.partial(compiled, *args)
  for name, call in list(calls.items()):  # What does not run leaves the turns.
    row = next(row for row in rows if row["name"] == name)
    if _made(row, call) is None:
      del calls[name]
  times = least_seconds(calls)
  for row in rows:
    if row["name"] in times:
      row["seconds"] = times[row["name"]]
      row["tokens_per_s"] = batch * length / row["seconds"]
  return rows


def _titans(quick: bool, rows: int, tokens: int) -> functools.partial:
  """The gradient of our layer of memory."""
  from experiments.bench import mixers

  _, net = _model("titans_lmm", tokens, rows, quick)
  return mixers.gradient(mixers.one_unit(net), tokens, rows)


def _step(name: str, least_seconds: Callable, quick: bool) -> dict:
  """A train step; fewer rows where these do not fit into the memory."""
  import jax

  from experiments.bench import steps
  from nl_jax.models import flops
  from nl_jax.train import progress

  rows, length = (4, 64) if quick else _STEP
  row = dict(kind="step", name=name, tokens=length)
  while rows:
    config, net = _model(name, length, rows, quick)
    rows, length = config.data.batch_size, config.data.sequence_length
    row |= dict(rows=rows, tokens=length)
    stepper = _made(row, functools.partial(steps.Stepper, config))
    times = stepper and _made(row, lambda: least_seconds({name: stepper}))  # noqa: B023
    if times:
      row |= dict(seconds=times[name], gib=_gib(stepper.step))
      row["tokens_per_s"] = rows * length / times[name]
      peak = progress.peak(jax.devices()[0].device_kind)
      work = flops.training(net, length) * row["tokens_per_s"]
      row["mfu"] = work / peak if peak else None
      row.pop("error", None)
      return row
    if "RESOURCE_EXHAUSTED" not in row["error"]:
      return row
    rows //= 2
  return row


def _made(row: dict, make: Callable[[], Any]) -> Any:
  """What is made, or None, with the reason in the row."""
  import jax

  try:
    return jax.block_until_ready(make())
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    row["error"] = str(error).splitlines()[0]
    return None


def _gib(compiled: Any) -> float:
  """Memory of the device that a program needs, by its compiler."""
  m = compiled.memory_analysis()
  return (
    m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    - m.alias_size_in_bytes
  ) / 2**30  # fmt: skip


def _compare(row: dict, rows: list[dict]) -> None:
  """Puts the ratio to attention into a row, and its words."""
  same = [
    other["tokens_per_s"]
    for other in rows
    if (other["kind"], other["name"]) == (row["kind"], BASE)
    and "seconds" in other
    and other["tokens"] == row["tokens"]
  ]
  speed = row.get("tokens_per_s")  # Rows may be fewer than attention's.
  row["ratio"] = same[0] / speed if speed and same else float("nan")
  row["target"], row["what"] = "reported", _words(row)


def _words(row: dict) -> str:
  kinds = {"mixer": "forward and backward of", "step": "train step of"}
  text = (
    f"{kinds[row['kind']]} {row['name']}, {row['rows']} x {row['tokens']:,}"
  )
  if "error" in row:
    return f"{text}: {row['error']}"
  text += f": {1e3 * row['seconds']:.2f} ms, {row['gib']:.2f} GiB"
  return text + (f", MFU {row['mfu']:.1%}" if row.get("mfu") else "")


def table(rows: list[dict]) -> str:
  """The rows as a table in Markdown; ratios are of the time of attention."""
  lines = [
    "| measured | rows x tokens | ms | tokens/s | ratio | GiB | MFU |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    shape = f"{row['rows']} x {row['tokens']:,}"
    cells = [f"{row['kind']} {row['name']}", shape]
    if "error" in row:
      cells += [row["error"], *[""] * 4]
    else:
      mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
      gib = f"{row['gib']:.2f}" if "gib" in row else ""
      cells += [
        f"{1e3 * row['seconds']:.2f}", f"{row['tokens_per_s']:,.0f}",
        f"{row['ratio']:.2f}", gib, mfu,
      ]  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _draw(rows: list[dict], path: pathlib.Path) -> None:
  """Nanoseconds a token of each mixer over the length of the text."""
  from nl_jax.report import charts

  figure = charts.new_figure((8.0, 5.0))
  axes = figure.subplots()
  curves: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    if row["kind"] == "mixer" and "seconds" in row:
      point = row["tokens"], 1e9 / row["tokens_per_s"]
      curves.setdefault(row["name"], []).append(point)
  drawn = [
    charts.Curve(name, *map(list, zip(*sorted(points))), i,
                 i // len(charts.COLOURS))
    for i, (name, points) in enumerate(curves.items())
  ]  # fmt: skip
  title = "Forward and backward of one mixer: nanoseconds a token"
  charts.draw(axes, charts.Panel(title, "tokens", drawn, True), "#333a42")
  axes.set_xscale("log", base=2)
  figure.savefig(path, format="png", dpi=110, facecolor="white")
