"""The kernels of all walks: what they cost on a TPU, and whether they agree.

    python -m experiments.kernels --report --topology=v5e:2x2,v6e:2x2
    python -m experiments.kernels --check

--report compiles the walks of configs for chips that are not here: bundles,
slots, VMEM and bytes of main memory beside the XLA form of the same walks.
With --check it compares them with the figures that are kept in
kernels/walk/baselines, which --update writes. --tune tries other heads a step.
--check alone runs every walk on the device at hand, kernels against XLA: the
first thing to type on a TPU. --precision emulates the policies of products on
any device, keys and rates at their worst included. What the figures are and
are not: docs/kernels.md.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from absl import flags

from experiments.cli import command as command_lib
from experiments.cli import named
from experiments.kernels import table
from nl_jax.aot import chips

_REPORT = flags.DEFINE_boolean("report", False, "Compile and print estimates.")
_TUNE = flags.DEFINE_boolean("tune", False, "Write kernels/walk/tiles.json.")
_CHECK = flags.DEFINE_boolean(
  "check", False, "Kernels against XLA here; with --report its baselines."
)
_UPDATE = flags.DEFINE_boolean("update", False, "Write the report's baselines.")
_TOPOLOGY = flags.DEFINE_list(
  "topology", ["v5e:2x2"], "Chips and sides: v5e:2x2,v5p:2x2x1,v6e:2x2."
)
_CONFIG = flags.DEFINE_list("config", [], "Of these; default all at 1b3.")
_JSON = flags.DEFINE_string("json", "", "Also write the report as JSON.")
_PEER = flags.DEFINE_string(
  "peer", "", "A Python >= 3.12 that has deltanet-tpu, compiled beside ours."
)
_PRECISION = flags.DEFINE_boolean(
  "precision", False, "Errors of the policies of products, emulated here."
)
_ROOT = pathlib.Path(__file__).parents[2]
_WALK = _ROOT / "kernels" / "walk"
_SECONDS = 1800  # Of all walks of a config; the slowest take a few minutes.


def main() -> int:
  """Runs the command; returns its exit status."""
  _check_flags()
  if _PRECISION.value:
    return _precision()
  if _CHECK.value and not _REPORT.value:
    return _check()
  from nl_jax.aot import programs

  programs.require_compiler()
  configs = _configs()
  if _TUNE.value:
    return _tune(configs)
  return _report(configs)


def _check_flags() -> None:
  given = [_REPORT.value, _TUNE.value, _CHECK.value, _PRECISION.value]
  if not any(given):
    raise ValueError(
      "give one of --report (with --topology=v5e:2x2), --tune, --check and "
      "--precision"
    )
  if _PRECISION.value and sum(given) > 1:
    raise ValueError("--precision goes alone: it compiles no kernel")
  if _TUNE.value and (_REPORT.value or _CHECK.value):
    raise ValueError("--tune goes alone: it compiles other kernels")
  if (_UPDATE.value or _JSON.value or _PEER.value) and not _REPORT.value:
    raise ValueError("--update, --json and --peer belong to --report")
  if _UPDATE.value and _CHECK.value:
    raise ValueError("give --update or --check: the one writes what the other "
                     "reads")  # fmt: skip
  if not _TOPOLOGY.value:
    raise ValueError("--topology is empty: write v5e:2x2, say")
  for topology in _TOPOLOGY.value:
    chips.kind(topology)
  if _JSON.value and os.path.exists(_JSON.value):
    raise ValueError(f"--json={_JSON.value} exists; give another file")
  if _PEER.value and shutil.which(_PEER.value) is None:
    raise ValueError(f"--peer={_PEER.value}: there is no such program")
  for name in _CONFIG.value:
    named.load_config(name)


def _configs() -> list[str]:
  """Those of --config, or every arch that has a walk, at 1b3."""
  if _CONFIG.value:
    return _CONFIG.value
  return [f"{arch}_1b3" for arch in _archs()]


def _archs() -> list[str]:
  """Archs whose mixer has the switch `walk`."""
  from nl_jax.models import lm

  def has_walk(options: Any) -> bool:
    return dataclasses.is_dataclass(options) and any(
      field.name == "walk" for field in dataclasses.fields(options)
    )

  return [arch for arch, m in lm.MIXERS.items() if has_walk(m.Options)]


def _precision() -> int:
  """Policies of products against float32, on this device."""
  from experiments.kernels import precision

  command_lib.say("two minutes on two cores ...")
  print(precision.table(), flush=True)
  return command_lib.DONE


def _check() -> int:
  """Kernels against XLA on this device."""
  from experiments.kernels import check

  off = []
  for line in check.run(_configs()):
    print(line, flush=True)
    if not line.holds:
      off.append(line.config)
  if off:
    command_lib.say(f"{len(off)} of the walks are off: {', '.join(off)}")
  return command_lib.PARTLY_FAILED if off else command_lib.DONE


def _report(configs: list[str]) -> int:
  """Prints tables, one after the other, and what is worse than before."""
  reports, failed = [], []
  for topology in _TOPOLOGY.value:
    rows = _rows(configs, topology)
    reports.append(dict(topology=topology, rows=rows))
    print(table.table(rows, topology) + "\n")
    print(table.xla_table(rows, topology) + "\n", flush=True)
    failed += [r["error"] for r in rows if "error" in r]
    if _UPDATE.value:
      _update(topology, rows)
    elif _CHECK.value:
      worse = table.worse(rows, _held(topology))
      print("\n".join(worse) or f"{topology}: as the baseline", flush=True)
      failed += worse
    if _PEER.value:
      print(_peer(topology), flush=True)
  print("\n".join(f"* {caveat}" for caveat in table.CAVEATS))
  versions = _versions()
  print(", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
  if _JSON.value:
    made = dict(about=versions, caveats=table.CAVEATS, reports=reports)
    with open(_JSON.value, "x", encoding="utf-8") as file:
      json.dump(made, file, indent=2)
  return command_lib.PARTLY_FAILED if failed else command_lib.DONE


def _tune(configs: list[str]) -> int:
  """Writes the heads a step that beat the default."""
  path = _WALK / "tiles.json"
  tiles = json.loads(path.read_text()) if path.exists() else []
  for topology in _TOPOLOGY.value:
    rows = _rows(configs, topology, tune=True)
    for row in rows:
      for made in row.get("tries", ()):
        bundles = made.get("bundles")
        said = f"{bundles:,.0f} bundles" if bundles else "not compiled"
        note = ", the default" if made["heads"] == row["step"] else ""
        print(f"{topology} {row['body']} of {row['config']}: "
              f"{made['heads']} heads a step{note}: {said}",
              flush=True)  # fmt: skip
    tiles = table.tiles(rows, tiles)
  _write(path, tiles)
  return command_lib.DONE


def _rows(
  configs: list[str], topology: str, tune: bool = False
) -> list[dict[str, Any]]:
  """Of all configs, each in a process of its own; a body once."""
  rows: list[dict[str, Any]] = []
  for config in configs:
    command_lib.say(f"compiling the walks of {config} for {topology} ...")
    request = dict(
      config=config, topology=topology, tune=tune,
      known=[row["digest"] for row in rows if "error" not in row],
    )  # fmt: skip
    rows += _in_a_process(request)
  return rows


def _in_a_process(request: dict[str, Any]) -> list[dict[str, Any]]:
  from experiments.kernels import compile

  command = [sys.executable, "-m", "experiments.kernels.compile",
             json.dumps(request)]  # fmt: skip
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, cwd=_ROOT, timeout=_SECONDS
    )
  except subprocess.TimeoutExpired:
    error = f"no answer of the compiler in {_SECONDS} s"
  else:
    rows = compile.answer(done.stdout)
    if rows is not None:
      return rows
    lines = done.stderr.strip().splitlines() or ["no output"]
    errors = [line for line in lines if "Error: " in line]
    error = (errors or lines)[-1]
  config = request["config"]
  command_lib.say(f"{config} for {request['topology']}: {error}")
  return [dict(config=config, body="-", K=0, M=0, C=0, digest=config,
               error=error)]  # fmt: skip


def _baseline(topology: str) -> pathlib.Path:
  chip = topology.partition(":")[0]
  return _WALK / "baselines" / _versions()["libtpu"] / f"{chip}.json"


def _held(topology: str) -> list[dict[str, Any]]:
  path = _baseline(topology)
  if not path.exists():
    raise ValueError(
      f"there is no baseline {path.relative_to(_ROOT)}: --report --update "
      "writes one"
    )
  return json.loads(path.read_text())


def _update(topology: str, rows: list[dict[str, Any]]) -> None:
  """Writes the baseline of a chip; configs that were not asked stay."""
  path = _baseline(topology)
  asked = {row["config"] for row in rows}
  kept = [
    row for row in (_held(topology) if path.exists() else [])
    if not asked & set(row["configs"])
  ]  # fmt: skip
  _write(path, kept + table.baseline(rows))


def _peer(topology: str) -> str:
  """Markdown: what deltanet-tpu's kernels are, by another Python."""
  script = _ROOT / "experiments" / "kernels" / "peer.py"
  done = subprocess.run(
    [_PEER.value, str(script), topology],
    capture_output=True, text=True, timeout=_SECONDS,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
  )  # fmt: skip
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no output"]
    raise ValueError(f"--peer={_PEER.value}: {lines[-1]}")
  return done.stdout


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """JSON with a row a line."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
  path.write_text(f"[\n{lines}\n]\n" if rows else "[]\n", encoding="utf-8")
  command_lib.say(f"wrote {path.relative_to(_ROOT)}")


def _versions() -> dict[str, str]:
  import importlib.metadata

  return {k: importlib.metadata.version(k) for k in ("jax", "libtpu")}


if __name__ == "__main__":
  command_lib.run(main)
