"""Table 1 of a run: what is scored, task by task, and its progress."""

import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.cli import command, distributed
from experiments.table1 import result as result_lib
from experiments.table1 import training
from nl_jax import build, sharding
from nl_jax.data import tokenizers
from nl_jax.eval import (
  encoding,
  evaluate,
  report,
  requests,
  scoring,
  special,
)
from nl_jax.train import checkpoint

Asked, Loaded = result_lib.Asked, result_lib.Loaded
_WINDOW = 2048  # Shown beside a longer trained length.
_PATIENCE = 10.0  # Seconds between lines where there is no terminal.
_ROOT = pathlib.Path(__file__).parents[2]


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
  result = result_lib.about(asked, loaded, protocol, windows)
  before = result_lib.before(out, result)
  known = {name: task["sha256"] for name, task in sorted(before.items())}
  distributed.check_same("result", f"{out}: {known}")
  for name, one in _score(asked, loaded, scorer, protocol, windows, before):
    result["tasks"][name] = one.record
    result_lib.finish(result, scorer, begin)
    result_lib.keep(asked, out, result, name, one)
  if distributed.first():
    print(report.text(report.lines(result, others)))
    print("\n" + "\n".join(report.footer(result)))
    print(f"result: {out}")
  return _status(result)


def _trained(asked: Asked, step: int | None) -> Loaded:
  workdir = pathlib.Path(asked.workdir)
  if not workdir.is_dir():
    raise ValueError(f"no folder {workdir}: give the --workdir of a run")
  config, net = build.of_run(asked.workdir)
  # As training has it: a sweep over checkpoints compiles once.
  cache = str(workdir / "compilation_cache")
  jax.config.update("jax_compilation_cache_dir", cache)
  mesh = sharding.mesh()
  tokenizer = build.tokenizer(config)
  params, step = checkpoint.load_params(
    asked.workdir, net, step=step, mesh=mesh
  )
  command.tell(f"{config.model.arch} at step {step} of {workdir}")
  name = workdir.resolve().name
  return Loaded(name, config, net, params, mesh, step, tokenizer)


def _random(name: str, config: build.ConfigDict) -> Loaded:
  config = build.resolve(config)
  net, mesh = build.model(config), sharding.mesh()
  tokenizer = build.tokenizer(config)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  shardings = sharding.param_shardings(shapes, net.axes(), mesh)
  init = jax.jit(net.init, out_shardings=shardings)
  params = init(jax.random.key(config.train.seed))
  command.tell(
    f"no --workdir: random weights of {name}, which is what chance is"
  )
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
        one = training.prepare(
          full, pathlib.Path(asked.data_dir), loaded.tokenizer, protocol,
          asked.limit,
        )  # fmt: skip
      except evaluate.FAILURES as error:
        yield shown, _told(shown, evaluate.failed(error))
        continue
      kept = before.get(shown, {"sha256": ""})
      if kept["sha256"] == one.loaded.sha256 and not asked.samples:
        command.tell(f"{shown}: was scored before")
        yield shown, evaluate.Result(kept, [])
        continue
      prepared.append(one._replace(name=shown))
      for warning in one.loaded.warnings:
        command.tell(f"{shown}: {warning}")
  if not prepared:
    return
  with _Progress() as bar:
    score = distributed.together(
      lambda pairs: scorer(loaded.params, pairs, bar.show)
    )
    through = evaluate.through_seqio(prepared, loaded.tokenizer)
    for one in prepared:
      bar.start(one.name, len(one.rows.rows))
      result = evaluate.run(one, score, through)
      yield one.name, _told(one.name, result)


def _told(name: str, result: evaluate.Result) -> evaluate.Result:
  """The result of a task, after its line."""
  record = result.record
  if "error" in record:
    command.tell(f"{name}: failed: {record['error']}")
    return result
  shown = ", ".join(
    f"{key} {_figure(x['value'])} ± {_figure(x['stderr'])}"
    for key, x in record["metrics"].items()
  )
  command.tell(
    f"{name}: {record['n_docs']:,} documents, {record['n_rows']:,} rows in "
    f"{record['seconds']:.1f} s: {shown}"
  )
  return result


def _figure(value: float | None) -> str:
  return report.MISSING if value is None else f"{value:.4g}"


def _status(result: Mapping[str, Any]) -> int:
  failed = ["error" in task for task in result["tasks"].values()]
  if all(failed):
    return command.FAILED
  return command.PARTLY_FAILED if any(failed) else command.DONE


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
      disable=self._plain or not distributed.first(),
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
      command.tell(f"{self._name}: {done:,} of {total:,} rows")
