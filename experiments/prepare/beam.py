"""The shards of experiments.prepare as an Apache Beam pipeline.

    jobs.jsonl -> one element a shard -> Reshuffle -> make the shard

A worker makes a shard with the same `preparation.run_job` as a process of this
machine does, in a folder of its own, and then puts it into --out, its note
last. So the bytes are the same whoever makes them, and a shard that a runner
makes twice is the same twice. A mistake in the corpus is left as a sentence in
--out and not tried again; what else fails is the runner's to try again.
"""

import contextlib
import json
import pathlib
import shlex
import tempfile
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.metrics import metric
from apache_beam.options import pipeline_options
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.runners.portability import fn_api_runner

from experiments.cli import command
from experiments.prepare import pool, remote
from nl_jax import files
from nl_jax.data import partition, preparation, prepared

_JOBS = ".jobs.jsonl"  # Too many for the graph that is sent to a cluster.
_MISTAKE = "{}.mistake"
_BESIDE = "tokenizer_config.json"
_COUNTS = ("shards", "bytes")
# In this process a worker's own error comes through.
_GAVE_UP = (
  RuntimeError,
  OSError,
  dataflow_runner.DataflowRuntimeException,
)


def make(settings: partition.Settings, out: str, options: str) -> pool.Made:
  """Prepares a corpus by a pipeline.

  Args:
    settings: `path` of this machine, or an address that workers read.
    out: the folder, of this machine or an address that workers write.
    options: of Beam, as on a command line; without --runner, in this process
      or in processes of this machine (--direct_running_mode).

  Raises:
    ValueError: settings that do not fit, or a mistake in the corpus.
    OSError: the runner gave up.
  """
  parsed = _options(options)
  _check_reach(parsed, settings.path, out)
  if "://" in settings.path:
    settings = settings._replace(path=remote.Remote(settings.path))
  tokenizer = preparation.check(settings)
  about = preparation.claim(settings, tokenizer)
  folder = remote.Folder(out)
  with _claimed(out, folder, about) as here:
    with (here / _JOBS).open("w", encoding="utf-8") as file:
      for shards, pieces in enumerate(partition.plan(settings), 1):
        file.write(json.dumps([shards - 1, pieces]) + "\n")
    folder.remove(_MISTAKE.format("*"))
    # A shard that exists is complete: shards may be made again.
    folder.remove(prepared.MANIFEST)
    folder.put(here, [_JOBS])
    work = _Make(settings, out, _files_of(settings.tokenizer))
    with command.busy(f"making {shards} shards by Beam"):
      counts = _run(parsed, folder.path(_JOBS), work)
    _raise_mistake(folder, here)
    notes = [_name(preparation.note_path(here, i), here) for i in range(shards)]
    folder.get(here, notes)
    manifest = preparation.finish(here, settings, about, tokenizer, shards)
    folder.put(here, [prepared.MANIFEST])
    folder.remove(_JOBS)
  return pool.Made(manifest, shards, counts["shards"], counts["bytes"], "Beam")


def _options(text: str) -> pipeline_options.PipelineOptions:
  try:
    args = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"--beam={text!r} cannot be read: {error}") from error
  if args and not args[0].startswith("--"):
    raise ValueError(
      f"--beam={text!r} begins with no option of Beam; write "
      "--beam='--runner=DataflowRunner --project=...', or --beam= for this "
      "machine"
    )
  return pipeline_options.PipelineOptions(args)


def _runner(options: pipeline_options.PipelineOptions) -> str:
  chosen = options.view_as(pipeline_options.StandardOptions).runner
  return (chosen or "").rpartition(".")[2]


def _check_reach(
  options: pipeline_options.PipelineOptions, path: str, out: str
) -> None:
  """Workers of a cluster see no disk of this machine."""
  if "dataflow" not in _runner(options).lower():
    return
  for flag, value in (("path", path), ("out", out)):
    if "://" not in value:
      raise ValueError(
        f"--{flag}={value} is of this machine, and workers of "
        f"{_runner(options)} see none of it; give a folder of a store, as "
        "gs://bucket/folder"
      )


@contextlib.contextmanager
def _claimed(
  out: str, folder: remote.Folder, about: dict[str, Any]
) -> Iterator[pathlib.Path]:
  """A folder for what this process writes; --out is found to be ours."""
  with contextlib.ExitStack() as stack:
    name = stack.enter_context(tempfile.TemporaryDirectory())
    here = pathlib.Path(name)
    if "://" not in out:
      preparation.open_folder(pathlib.Path(out), about)
      stack.enter_context(preparation.lock(pathlib.Path(out)))
    elif not folder.get(here, [preparation.PLAN]) and not folder.is_empty():
      raise ValueError(
        f"{out} is not empty and holds no preparation; give another --out"
      )
    preparation.open_folder(here, about)
    folder.put(here, [preparation.PLAN])
    yield here


def _files_of(tokenizer: str) -> dict[str, bytes]:
  """What a worker needs to load a tokenizer: name and content of its files."""
  path = files.expand(tokenizer)
  both = [path, path.with_name(_BESIDE)] if tokenizer != "bytes" else []
  return {file.name: file.read_bytes() for file in both if file.is_file()}


def _run(
  options: pipeline_options.PipelineOptions, jobs: str, work: "_Make"
) -> dict[str, int]:
  """Runs the pipeline to its end; returns what the workers counted."""
  # Beam's own choice for no runner would look for a program on the network.
  runner = None if _runner(options) else fn_api_runner.FnApiRunner()
  pipeline = beam.Pipeline(runner, options)
  _ = (
    pipeline
    | "jobs" >> beam.io.ReadFromText(jobs)
    | "spread" >> beam.Reshuffle()
    | "make" >> beam.ParDo(work)
  )
  try:
    result = pipeline.run()
    result.wait_until_finish()
  except _GAVE_UP as error:
    raise OSError(
      f"the Beam job failed: {str(error).strip().splitlines()[-1]}; start the "
      "same command again: it resumes"
    ) from error
  query = metric.MetricsFilter().with_namespace(_Make)
  found = result.metrics().query(query)["counters"]
  counts = {x.key.metric.name: x.result for x in found}
  return {name: counts.get(name, 0) for name in _COUNTS}


class _Make(beam.DoFn):
  """Makes a shard, and puts it into --out.

  Args:
    settings: of all.
    out: the folder.
    tokenizer: its files, by name; none for bytes.
  """

  def __init__(
    self, settings: partition.Settings, out: str, tokenizer: dict[str, bytes]
  ):
    self._settings, self._out, self._tokenizer = settings, out, tokenizer

  def process(self, line: str) -> None:
    """Makes the shard of a line of the file of jobs."""
    number, pieces = json.loads(line)
    pieces = tuple(partition.Piece(*piece) for piece in pieces)
    out = remote.Folder(self._out)
    with tempfile.TemporaryDirectory() as name:
      here = pathlib.Path(name)
      job = preparation.Job(number, pieces, self._local(here), name)
      try:
        made = _make_one(out, here, job)
      except ValueError as error:
        mistake = _MISTAKE.format(f"{number:08d}")
        (here / mistake).write_text(str(error), "utf-8")
        out.put(here, [mistake])
        return
    if made:
      size = sum(piece.size for piece in pieces)
      metric.Metrics.counter(_Make, "shards").inc()
      metric.Metrics.counter(_Make, "bytes").inc(size)

  def _local(self, here: pathlib.Path) -> partition.Settings:
    """The settings, with a tokenizer of this machine."""
    if not self._tokenizer:
      return self._settings
    folder = here / "tokenizer"
    folder.mkdir()
    for name, content in self._tokenizer.items():
      (folder / name).write_bytes(content)
    own = pathlib.Path(self._settings.tokenizer).name
    return self._settings._replace(tokenizer=str(folder / own))


def _make_one(
  out: remote.Folder, here: pathlib.Path, job: preparation.Job
) -> bool:
  """Makes a shard in a folder and copies it, unless it is there."""
  note = preparation.note_path(here, job.number)
  note.parent.mkdir()
  if out.get(here, [_name(note, here)]):
    with contextlib.suppress(ValueError):  # Then it does not hold.
      shards = preparation.read_note(note)["shards"]
      out.get(here, [shard["file"] for shard in shards])
  if not preparation.run_job(job, lambda size: None):
    return False
  shards = json.loads(note.read_text("utf-8"))["shards"]
  # The note last: it says that the others are there.
  out.put(here, [*(shard["file"] for shard in shards), _name(note, here)])
  return True


def _name(path: pathlib.Path, folder: pathlib.Path) -> str:
  return path.relative_to(folder).as_posix()


def _raise_mistake(folder: remote.Folder, here: pathlib.Path) -> None:
  """Raises ValueError with the first sentence that a worker left."""
  for name in folder.names(_MISTAKE.format("*"))[:1]:
    folder.get(here, [name])
    raise ValueError((here / name).read_text("utf-8"))
