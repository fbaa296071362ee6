"""Table 1 of a run: what is scored, its result file, its progress."""

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
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from experiments import _main, _setup
from nl_jax import sharding, stream
from nl_jax.data import tokenizers
from nl_jax.eval import (
  encoding,
  evaluate,
  report,
  requests,
  scoring,
  special,
  table,
)
from nl_jax.train import checkpoint, environment, files

SCHEMA = 1
_KIND = "nl_jax table1"
_WINDOW = 2048  # Shown beside a longer trained length.
_PATIENCE = 10.0  # Seconds between lines where there is no terminal.
_ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Asked:
  """The flags of the command; see experiments/table1.py."""

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
  config: _setup.ConfigDict
  net: Any
  params: Any
  mesh: jax.sharding.Mesh
  step: int
  tokenizer: Any


def _say(text: str) -> None:
  """A line on stderr, once however many processes there are."""
  if jax.process_index() == 0:
    _main.say(text)


def require_seqio() -> None:
  """Raises ValueError where seqio or TensorFlow is not installed."""
  if not evaluate.has_seqio():
    raise ValueError(
      "seqio and TensorFlow are not installed: run `pip install -c "
      f"requirements.txt -e '.[eval]'` in {_ROOT}"
    )


def run(
  asked: Asked,
  step: int | None,
  chosen: tuple[str, Any] | None,
  others: Sequence[Mapping[str, Any]],
) -> int:
  """Scores, prints and keeps a table; returns the exit status.

  Args:
    asked: the flags.
    step: of the checkpoint; None: the newest.
    chosen: name and config of a model with random weights, or None.
    others: results to show below.
  """
  begin = time.monotonic()
  loaded = _random(*chosen) if chosen else _trained(asked, step)
  out = _out(asked, loaded)
  tokenizers.check_vocabulary(loaded.tokenizer, loaded.net.vocab_size)
  scorer = scoring.Scorer(
    loaded.net,
    loaded.tokenizer.vocab_size,
    loaded.mesh,
    batch_tokens=asked.batch_tokens,
    memorise=asked.memorise,
  )
  protocol = _protocol(asked, loaded)
  windows = asked.windows or _default_windows(loaded.net.sequence_length)
  result = _about(asked, loaded, protocol, windows)
  before = _before(out, result)
  for name, one in _score(asked, loaded, scorer, protocol, windows, before):
    result["tasks"][name] = one.record
    _finish(result, scorer, begin)
    _keep(asked, out, result, name, one)
  if jax.process_index() == 0:
    print(report.text(report.lines(result, others)))
    print("\n" + "\n".join(report.footer(result)))
    print(f"result: {out}")
  return _status(result)


def _trained(asked: Asked, step: int | None) -> Loaded:
  workdir = pathlib.Path(asked.workdir)
  if not workdir.is_dir():
    raise ValueError(f"no folder {workdir}: give the --workdir of a run")
  config = _setup.from_plain(checkpoint.read_config(asked.workdir))
  # As training has it: a sweep over checkpoints compiles once.
  cache = str(workdir / "compilation_cache")
  jax.config.update("jax_compilation_cache_dir", cache)
  net, mesh = _setup.model(config), sharding.mesh()
  tokenizer = tokenizers.load(config.data.tokenizer)
  params, step = checkpoint.load_params(
    asked.workdir, net, step=step, mesh=mesh
  )
  _say(f"{config.model.arch} at step {step} of {workdir}")
  name = workdir.resolve().name
  return Loaded(name, config, net, params, mesh, step, tokenizer)


def _random(name: str, config: _setup.ConfigDict) -> Loaded:
  config = _setup.resolve(config)
  net, mesh = _setup.model(config), sharding.mesh()
  tokenizer = tokenizers.load(config.data.tokenizer)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  shardings = sharding.param_shardings(shapes, mesh)
  init = jax.jit(net.init, out_shardings=shardings)
  params = init(jax.random.key(config.train.seed))
  _say(f"no --workdir: random weights of {name}, which is what chance is")
  return Loaded(name, config, net, params, mesh, 0, tokenizer)


def _out(asked: Asked, loaded: Loaded) -> pathlib.Path:
  """Where the result goes."""
  place = f"table1_{loaded.step}.json"
  if not asked.workdir:
    place = f"table1_{loaded.name.replace(':', '_')}_random.json"
  path = pathlib.Path(asked.out or pathlib.Path(asked.workdir) / place)
  if path.is_dir():
    raise ValueError(f"--out={path} is a folder; give it a file")
  return path


def _before(
  path: pathlib.Path, result: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Tasks that an earlier start of the command has scored.

  They stay in the result, so that tasks can be added and failed ones repeated.

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
    result = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    result = None
  if not isinstance(result, dict) or result.get("kind") != _KIND:
    raise ValueError(f"{path} is no result of `python -m experiments.table1`")
  if result["schema"] != SCHEMA:
    raise ValueError(
      f"{path} has schema {result['schema']}, this version reads {SCHEMA}"
    )
  return result


def _protocol(asked: Asked, loaded: Loaded) -> encoding.Protocol:
  found = special.ids(loaded.tokenizer)
  return encoding.Protocol(
    max_length=asked.max_length,
    window=loaded.net.sequence_length,  # Each task of WikiText sets its own.
    prefix_id=found.prefix,
    bos=asked.bos,
    bos_id=found.bos,
  )


def _default_windows(trained: int) -> tuple[int, ...]:
  return (trained, _WINDOW) if trained > _WINDOW else (trained,)


def _score(
  asked: Asked,
  loaded: Loaded,
  scorer: scoring.Scorer,
  protocol: encoding.Protocol,
  windows: Sequence[int],
  before: Mapping[str, dict[str, Any]],
) -> Iterator[tuple[str, evaluate.Result]]:
  """The result of each task, as it comes."""
  prepared = []
  for name in asked.tasks or requests.TASKS:
    # A window that is not shown is a task beside the mixture.
    sizes = windows if name == "wikitext" else (0,)
    for i, window in enumerate(sizes):
      full = f"{name}_{window}" if window else name
      shown = name if i == 0 else full
      try:
        one = evaluate.prepare(
          full, pathlib.Path(asked.data_dir), loaded.tokenizer, protocol,
          asked.limit,
        )  # fmt: skip
      except evaluate.FAILURES as error:
        yield shown, _told(shown, evaluate.failed(error))
        continue
      kept = before.get(shown, {"sha256": ""})
      if kept["sha256"] == one.loaded.sha256 and not asked.samples:
        _say(f"{shown}: was scored before")
        yield shown, evaluate.Result(kept, [])
        continue
      prepared.append(one._replace(name=shown))
      for warning in one.loaded.warnings:
        _say(f"{shown}: {warning}")
  if not prepared:
    return
  with _Progress() as bar:
    score = lambda pairs: scorer(loaded.params, pairs, bar.show)
    through = evaluate.through_seqio(prepared, loaded.tokenizer)
    for one in prepared:
      bar.start(one.name, len(one.rows.rows))
      result = evaluate.run(one, score, through)
      yield one.name, _told(one.name, result)


def _told(name: str, result: evaluate.Result) -> evaluate.Result:
  """The result of a task, after its line."""
  record = result.record
  if "error" in record:
    _say(f"{name}: failed: {record['error']}")
    return result
  shown = ", ".join(
    f"{key} {_figure(x['value'])} ± {_figure(x['stderr'])}"
    for key, x in record["metrics"].items()
  )
  _say(
    f"{name}: {record['n_docs']:,} documents, {record['n_rows']:,} rows in "
    f"{record['seconds']:.1f} s: {shown}"
  )
  return result


def _figure(value: float | None) -> str:
  return report.MISSING if value is None else f"{value:.4g}"


def _about(
  asked: Asked,
  loaded: Loaded,
  protocol: encoding.Protocol,
  windows: Sequence[int],
) -> dict[str, Any]:
  """All of a result that is known before a task is scored."""
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
  net, config = loaded.net, _setup.plain(loaded.config)
  total = net.parameter_count()
  outside = net.vocab_size * net.width * (1 if net.tied else 2)
  place = f"{asked.workdir}/{files.CHECKPOINTS}/{loaded.step}"
  one_process = jax.process_count() == 1
  return {
    "config": loaded.name,
    "arch": net.arch,
    "resolved": config,
    "config_sha256": _digest(config),
    "parameters": total,
    "parameters_without_embedding": total - outside,
    "sequence_length": net.sequence_length,
    "tokens_trained": loaded.step * _setup.tokens_per_step(loaded.config),
    "workdir": asked.workdir,
    "checkpoint": place if asked.workdir else "",
    "step": loaded.step,
    "weights_sha256": stream.weights_hash(loaded.params) if one_process else "",
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


def _finish(
  result: dict[str, Any], scorer: scoring.Scorer, begin: float
) -> None:
  """What the tasks scored so far make of the rest of a result."""
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


def _keep(
  asked: Asked,
  out: pathlib.Path,
  result: Mapping[str, Any],
  name: str = "",
  one: evaluate.Result | None = None,
) -> None:
  """Writes the result as it stands; of several processes, the first does."""
  if jax.process_index():
    return
  files.write_json(out, _finite(result))
  if asked.samples and one is not None and one.samples:
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


def _status(result: Mapping[str, Any]) -> int:
  failed = ["error" in task for task in result["tasks"].values()]
  if all(failed):
    return _main.FAILED
  return _main.PARTLY_FAILED if any(failed) else _main.DONE


class _Progress:
  """A bar a task on a terminal; elsewhere a line now and then."""

  def __init__(self):
    import rich.console
    import rich.progress

    self._plain = not sys.stderr.isatty()
    self._told, self._name = time.monotonic(), ""
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(),
      console=rich.console.Console(stderr=True),
      disable=self._plain or bool(jax.process_index()),
      transient=True,
    )
    self._task = self._bar.add_task("")

  def __enter__(self) -> "_Progress":
    self._bar.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.stop()

  def start(self, name: str, rows: int) -> None:
    """A task begins."""
    self._name, self._told = name, time.monotonic()
    self._bar.reset(self._task, description=name, total=rows)

  def show(self, done: int, total: int) -> None:
    """Rows of the task that are scored."""
    self._bar.update(self._task, completed=done, total=total)
    if self._plain and time.monotonic() - self._told > _PATIENCE:
      self._told = time.monotonic()
      _say(f"{self._name}: {done:,} of {total:,} rows")
