"""The result file of Table 1: all that a number depends on."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from nl_jax import build, stream
from nl_jax.eval import encoding, evaluate, scoring, special, table
from nl_jax.train import environment, files

SCHEMA = 1
_KIND = "nl_jax table1"
_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Asked:
  """The flags of the command; see experiments/table1/__main__.py."""

  workdir: str
  data_dir: str
  tasks: tuple[str, ...]
  limit: int
  bos: str
  max_length: int
  windows: tuple[int, ...]
  batch_tokens: int
  memorise: str
  reference: str
  samples: bool
  out: str
  command: str


class Loaded(NamedTuple):
  """A model that is to be scored.

  Attributes:
    name: of its config or workdir.
    config: resolved.
    net: the model.
    params: its weights, on the mesh.
    mesh: of all devices.
    step: updates made; 0 of random weights.
    tokenizer: that it was trained with.
  """

  name: str
  config: build.ConfigDict
  net: Any
  params: Any
  mesh: jax.sharding.Mesh
  step: int
  tokenizer: Any


def about(
  asked: Asked,
  loaded: Loaded,
  protocol: encoding.Protocol,
  windows: Sequence[int],
) -> dict[str, Any]:
  """All of a result that is known before a task is scored.

  Args:
    asked: the flags.
    loaded: the model.
    protocol: of the rows.
    windows: of WikiText, the shown one first.
  """
  tokenizer = loaded.tokenizer
  return {
    "kind": _KIND,
    "schema": SCHEMA,
    "run": {
      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "command": asked.command,
      **_versions(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "hosts": jax.process_count(),
      "machine": platform.machine(),
    },
    "model": _model(asked, loaded),
    "protocol": {
      "mixture": "nl_table1",
      "shots": 0,
      "bos": protocol.bos,
      "prefix_id": protocol.prefix_id,
      "max_length": protocol.max_length,
      "wiki_max_length": list(windows),
      "limit": asked.limit,
      "state_policy": "reset",
      "chunks": {
        row.name: row.chunk
        for row in loaded.net.levels()[0]
        if row.kind in ("memory", "feed-forward") and row.chunk > 0
      },
      "dtype": loaded.net.dtype,
      "log_softmax_dtype": "float32",
      "batch_tokens": asked.batch_tokens,
      "memorise": asked.memorise,
      "seed": loaded.config.train.seed,
    },
    "tokenizer": {
      "kind": special.kind(tokenizer),
      "name": pathlib.Path(tokenizer.name).name,
      "sha256": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      "model_vocab_size": loaded.net.vocab_size,
    },
    "tasks": {},
    "reference": {"version": asked.reference},
  }


def _model(asked: Asked, loaded: Loaded) -> dict[str, Any]:
  """What is scored: config, size, training so far, weights."""
  net, config = loaded.net, build.plain(loaded.config)
  total = net.parameter_count()
  outside = net.vocab_size * net.width * (1 if net.tied else 2)
  place = f"{asked.workdir}/{files.CHECKPOINTS}/{loaded.step}"
  return {
    "config": loaded.name,
    "arch": net.arch,
    "resolved": config,
    "config_sha256": _digest(config),
    "parameters": total,
    "parameters_without_embedding": total - outside,
    "sequence_length": net.sequence_length,
    "tokens_trained": loaded.step * build.tokens_per_step(loaded.config),
    "workdir": asked.workdir,
    "checkpoint": place if asked.workdir else "",
    "step": loaded.step,
    "weights_sha256": stream.weights_hash(build.gathered(loaded.params)),
    "random_init": not asked.workdir,
  }


def _versions() -> dict[str, Any]:
  """Of libraries and of the code."""
  about = environment.describe()
  more = {name: metadata.version(name) for name in ("nl_jax", "numpy")}
  versions = about["versions"] | more | evaluate.versions()
  return {"versions": versions, "git": about["git"], "dirty": _dirty()}


def _dirty() -> bool | None:
  """Whether the checkout has changes; None outside of one."""
  try:
    answer = subprocess.run(
      ["git", "status", "--porcelain", "--untracked-files=no"],
      cwd=_ROOT, capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
  except (OSError, subprocess.TimeoutExpired):
    return None
  return bool(answer.stdout.strip()) if answer.returncode == 0 else None


def _digest(config: Mapping[str, Any]) -> str:
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def before(
  path: pathlib.Path, result: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Tasks that an earlier start of the command has scored.

  They stay in the result, so that tasks can be added and failed ones repeated.

  Args:
    path: of the result file; its folder is made if missing.
    result: of `about`; takes the tasks that did not fail.

  Raises:
    ValueError: the file is of other weights or of another protocol.
  """
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    return {}
  earlier = read(path)
  if _identity(earlier) != _identity(result):
    raise ValueError(
      f"{path} holds a result of other weights or settings; give another "
      "--out or move it away"
    )
  tasks = earlier["tasks"]
  result["tasks"] = {k: x for k, x in tasks.items() if "error" not in x}
  return dict(result["tasks"])


def _identity(result: Mapping[str, Any]) -> Any:
  """What two results must share to be one."""
  free = ("batch_tokens", "buckets")  # They change no number.
  protocol = {k: x for k, x in result["protocol"].items() if k not in free}
  weights = [result["model"][key] for key in ("weights_sha256", "step")]
  return protocol, weights, result["tokenizer"]["sha256"]


def read(path: str | os.PathLike) -> dict[str, Any]:
  """A result file.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no result of this command.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no result file {path}")
  try:
    result = files.read_json(path)
  except ValueError:
    result = None
  if not isinstance(result, dict) or result.get("kind") != _KIND:
    raise ValueError(
      f"{path} is not a result of `python -m experiments.table1`"
    )
  if result.get("schema") != SCHEMA:
    raise ValueError(
      f"{path} has schema {result.get('schema')!r}, this version reads {SCHEMA}"
    )
  return result


def finish(
  result: dict[str, Any], scorer: scoring.Scorer, begin: float
) -> None:
  """What the tasks scored so far make of the rest of a result.

  Args:
    result: is filled in: the table's row, differences, shapes, memory.
    scorer: that scored.
    begin: of the command, `time.monotonic`.
  """
  unit = 1 if sys.platform == "darwin" else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  result["run"]["seconds"] = round(time.monotonic() - begin, 1)
  result["run"]["peak_host_memory_bytes"] = peak
  result["protocol"]["buckets"] = sorted(map(list, scorer.shapes))
  result["table_row"] = table.row(result)
  version = result["reference"]["version"]
  model = result["model"]
  row, _ = table.reference(model["arch"], model["parameters"], version)
  if row:
    away = table.differences(table.cells(result), row)
    result["reference"] |= {
      **row._asdict(),
      "differences": {key: round(x, 2) for key, x in away.items()},
    }


def keep(
  asked: Asked,
  out: pathlib.Path,
  result: Mapping[str, Any],
  name: str,
  one: evaluate.Result,
) -> None:
  """Writes the result as it stands; of several processes, the first does.

  Args:
    asked: the flags.
    out: the file.
    result: of `about`.
    name, one: the task scored last, whose samples are kept if asked for.
  """
  if jax.process_index():
    return
  files.write_json(out, _finite(result))
  if asked.samples and one.samples:
    path = out.parent / "samples" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(sample) for sample in one.samples)
    files.replace(path, "\n".join(lines) + "\n")


def _finite(x: Any) -> Any:
  """What JSON has no number for is null."""
  if isinstance(x, Mapping):
    return {key: _finite(value) for key, value in x.items()}
  if isinstance(x, float) and not math.isfinite(x):
    return None
  return x
