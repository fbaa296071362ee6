"""Compiles the steps of a config for a TPU slice, on a machine without one.

    python -m experiments.compile --config=hope_1b3 --topology=v5e:16x16
    python -m experiments.compile --plot=a.json,b.json --output=steps.png

The real train step and decode step go through the TPU's own compiler. Printed
are the bytes that each chip needs, the transfers between chips, the products,
a roofline with the time that it implies, and the time by the schedules of all
operations and kernels, by part of the model: estimates. No TPU has run it.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any, NoReturn

from absl import flags, logging

from experiments.cli import command, named
from nl_jax.aot import chips

named.define_config(required=False)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "Chip and sides of the slice: v5e:16x16."
)
_MESH = flags.DEFINE_string(
  "mesh", "", "Sizes of axes: fsdp=128,tensor=2; default the config's."
)
_ALL = flags.DEFINE_boolean("all", False, "A slice of every kind of chip.")
_PROGRAMS = flags.DEFINE_list(
  "programs", ["train", "decode"], "Of train, decode."
)
_OUTPUT = flags.DEFINE_string("output", "", "Also write the report as JSON.")
_PLOT = flags.DEFINE_list(
  "plot", [], "Reports of --output; draws their steps over the length of rows."
)
CAVEATS = (
  "Estimates read from the compiler; no TPU has run this.",
  "Products, bytes and cycles count loops by their trips; all branches of a "
  "choice count.",
  "Bytes of main memory are those of each fused operation's arrays: an upper "
  "bound where the compiler keeps them on the chip.",
  "Products of one row, which the compiler writes as sums, and those inside "
  "kernels are not among the GFLOP; the estimate has those of the formula at "
  "least.",
  "By bundles: kernels take their bundles times the steps of their grids (of "
  "attention the blocks that the mask leaves), other operations their "
  "bundles, loops by their turns, and 180 cycles, or their products at the "
  "peak or their bytes at the rate of main memory if those take longer; "
  "transfers that are not hidden come on top, stalls do not.",
  "The compiler's cycles leave out kernels and transfers and overcharge what "
  "is small or on the chip.",
  "Transfers go along one axis of the torus at the maker's rate, without "
  "latency.",
  "Temporaries leave out what the compiler keeps on the chip.",
)


def main() -> int:
  """Runs the command; returns its exit status."""
  if _PLOT.value:
    return _plot()
  _check_flags()
  signal.signal(signal.SIGTERM, _terminated)
  command.say(f"loading JAX and the compiler, for {named.chosen_name()} ...")
  from nl_jax.aot import programs

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    programs.environment(folder)
    if _ALL.value:
      reports = [_in_a_process(n, c) for n, c in chips.CHIPS.items()]
    else:
      reports = [_report(_TOPOLOGY.value, folder)]
  if _OUTPUT.value:
    about = dict(config=named.chosen_name(), **_versions())
    with open(_OUTPUT.value, "x", encoding="utf-8") as file:
      json.dump(dict(about=about, caveats=CAVEATS, reports=reports), file,
                indent=2)  # fmt: skip
  if _ALL.value:
    print(table(reports))
  failed = any("error" in report for report in reports)
  return command.PARTLY_FAILED if failed else command.DONE


def _plot() -> int:
  """Draws reports; --output is the picture."""
  from experiments.compile import plot

  if not _OUTPUT.value or os.path.exists(_OUTPUT.value):
    raise ValueError(
      "--plot draws into a new file: give --output=<name>.png, got "
      f"{_OUTPUT.value!r}"
    )
  points = plot.read(_PLOT.value)
  plot.draw(points, "Estimated train steps", _OUTPUT.value)
  command.say(f"wrote {_OUTPUT.value}")
  return command.DONE


def _terminated(number: int, frame: Any) -> NoReturn:
  """Ends the command, and with it the process of a chip."""
  del number, frame
  sys.exit(command.TERMINATED)


def _check_flags() -> None:
  if flags.FLAGS.config is None:
    raise ValueError(
      "--config is required, or --plot with reports. Known: "
      + ", ".join(named.config_names())
    )
  if _ALL.value == bool(_TOPOLOGY.value):
    raise ValueError(
      "give one of --topology=<chip>:<sides>, as v5e:16x16, and --all"
    )
  if _TOPOLOGY.value:
    chips.kind(_TOPOLOGY.value)
  known = ("train", "decode")
  if not _PROGRAMS.value or not set(_PROGRAMS.value) <= set(known):
    raise ValueError(
      f"--programs must be of {', '.join(known)}, got "
      f"{','.join(_PROGRAMS.value)!r}"
    )
  if _OUTPUT.value and os.path.exists(_OUTPUT.value):
    raise ValueError(
      f"--output={_OUTPUT.value} already exists; give another file"
    )


def _report(topology: str, folder: pathlib.Path) -> dict[str, Any]:
  """Compiles for a topology and prints what comes out."""
  from nl_jax import build
  from nl_jax.aot import programs

  logging.set_verbosity(logging.WARNING)
  config = flags.FLAGS.config
  with config.unlocked():
    config.mesh.update(programs.asked_mesh(_MESH.value))
    if config.train.dtype == "auto":
      config.train.dtype = "bfloat16"  # Of the chips, not of this machine.
  config = build.resolve(config)
  build.settings(config)  # Raises what experiments.lm does.
  chip = chips.kind(topology)
  found = programs.devices(topology)
  # The compiler's own handler would print a trace; Python's would wait for it.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  mesh = build.mesh(config, found)
  rows = []
  for program in _PROGRAMS.value:
    with command.busy(f"compiling the {program} step for {topology}"):
      row = programs.report(config, program, mesh, chip, folder)
    rows.append(row)
  report = dict(
    config=named.chosen_name(),
    topology=topology,
    mesh=dict(mesh.shape),
    batch=[config.data.batch_size, config.data.sequence_length],
    programs=rows,
  )
  print(table([report]))
  for row in rows:
    print(transfers(row), flush=True)
  print("\n".join(f"* {caveat}" for caveat in CAVEATS), flush=True)
  return report


def _in_a_process(name: str, chip: chips.Chip) -> dict[str, Any]:
  """A report of its own process: the compiler's settings are a process's."""
  topology = f"{name}:{chip.slice}"
  own = ("--all", "--output", "--topology")
  kept = [a for a in sys.argv[1:] if a.partition("=")[0] not in own]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.json"
    with command.busy(f"compiling for {topology}"):
      done = subprocess.run(
        [sys.executable, "-m", "experiments.compile", *kept,
         f"--topology={topology}", f"--output={path}"],
        stderr=subprocess.PIPE, text=True,
      )  # fmt: skip
    if path.is_file():
      return json.loads(path.read_text())["reports"][0]
  lines = done.stderr.strip().splitlines() or ["no output"]
  command.say(f"{topology}: {lines[-1]}")
  return dict(topology=topology, error=lines[-1])


def _versions() -> dict[str, str]:
  import importlib.metadata

  return {k: importlib.metadata.version(k) for k in ("jax", "libtpu")}


def table(reports: list[dict[str, Any]]) -> str:
  """Markdown: a line a program; sizes and operations of a device."""
  lines = [
    "| slice | mesh | step | weights + optimizer | temporaries | total of "
    "memory | GFLOP | transfers | roofline, seconds | by bundles, seconds | "
    "compiler's cycles, seconds | compiled in |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for report in reports:
    if "error" in report:
      lines.append(f"| {report['topology']} | failed: {report['error']} |")
      continue
    mesh = " ".join(f"{k} {v}" for k, v in report["mesh"].items() if v > 1)
    for row in report["programs"]:
      lines.append(f"| {report['topology']} | {mesh or 'one device'} | "
                   f"{row['program']} | {_line(row)} |")  # fmt: skip
  return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
  memory = row["memory"]
  held = memory["parameters"] + memory["optimizer"] + memory.get("state", 0)
  capacity = f"{_size(row['capacity'])}"
  if "refused" in row:
    return (
      f"{_size(held)} | - | does not fit {capacity}: {row['advice']} "
      "| - | - | - | - | - | -"
    )
  fits = "" if row["fits"] else f" **does not fit: {row['advice']}**"
  least, most = row["estimate"]["least"], row["estimate"]["most"]
  cycles = row["estimate"]["cycles"]
  return " | ".join(
    [
      _size(held),
      _size(memory["temporaries"]),
      f"{_size(memory['total'])} of {capacity}{fits}",
      f"{row['flops'] / 1e9:,.1f}",
      _size(sum(c["wire"] for c in row["collectives"])),
      f"{least:.3g} to {most:.3g}",
      f"{row['schedule']['seconds']:.3g}" if row["schedule"] else "-",
      f"{cycles:.3g}" if cycles else "-",
      f"{row['compile_seconds']:.0f} s",
    ]
  )


def transfers(row: dict[str, Any]) -> str:
  """Markdown: transfers by kind and place, and the roofline's parts."""
  if "refused" in row:
    return f"\n{row['program']}: {row['refused']}"
  lines = [
    f"\n{row['program']}: transfers of each device in a step\n",
    "| kind | over | where | hidden | count | arrays | sent |",
    "|---|---|---|---|---|---|---|",
  ]
  for c in row["collectives"]:
    hidden, axes = "yes" if c["hidden"] else "no", c["axes"] or "-"
    lines.append(
      f"| {c['kind']} | {axes} | {c['place']} | {hidden} | {c['count']} | "
      f"{_size(c['payload'])} | {_size(c['wire'])} |"
    )
  for walk in row["walks"]:
    why = f": {walk['refused']}" if walk["refused"] else ""
    lines.append(
      f"\nwalk {walk['name']}, chunks of {walk['chunk']}: {walk['ran']}{why}"
    )
  estimate = row["estimate"]
  if made := row["schedule"]:
    lines.append(schedule(made))
  parts = [f"{k} {estimate[k]:.3g} s" for k in ("products", "memory", "links")]
  if estimate["cycles"] is not None:
    parts.append(f"the compiler's cycles {estimate['cycles']:.3g} s")
  else:
    parts.append(f"the compiler's cycles {row['cycles']:.3g}, no clock known")
  lines.append(f"\nestimate, if one thing bounds all: {', '.join(parts)}")
  if row["unknown"]:
    lines.append(f"without a number: {', '.join(row['unknown'])}")
  if busy := row["formula_seconds"]:
    lines.append(
      f"by formula {row['formula'] / 1e9:,.1f} GFLOP, kernels too and nothing "
      f"twice: MFU of {busy / estimate['most']:.2f} to "
      f"{busy / estimate['least']:.2f} at the estimated seconds"
    )
  return "\n".join(lines)


def schedule(made: dict[str, Any]) -> str:
  """Markdown: the time by bundles, and of which part of the model it is."""
  kinds = [f"{k} {made[k]:.3g} s" for k in ("kernels", "operations", "links")]
  text = (
    f"\nby bundles {made['seconds']:.3g} s: {', '.join(kinds)}; "
    f"{made['launches']:,} launches"
  )
  if made["unknown"]:
    text += f", {made['unknown']:,} of them without a schedule"
  lines = [text + "\n", "| part | ms | share |", "|---|---|---|"]
  for name, seconds in made["parts"].items():
    share = seconds / made["seconds"]
    lines.append(f"| {name} | {1e3 * seconds:.1f} | {share:.0%} |")
  return "\n".join(lines)


def _size(count: float) -> str:
  for unit, power in (("GiB", 3), ("MiB", 2)):
    if count >= 2 ** (10 * power):
      return f"{count / 2 ** (10 * power):.2f} {unit}"
  return f"{count / 1024:.1f} KiB"


if __name__ == "__main__":
  command.run(main)
