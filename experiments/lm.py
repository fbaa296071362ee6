"""Trains a language model: `python -m experiments.lm --config=hope_tiny`.

The same command resumes where an earlier one stopped; several processes, as on
the workers of a slice, are each started with it (experiments/distributed.py).
The workdir holds everything: config.json, metrics.jsonl, events/ (TensorBoard),
checkpoints/, sample.txt and, at the end, results.json, report.html and
report.png.
"""

import functools
import os
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags, logging

from experiments.cli import command, distributed, named

named.define_config()
distributed.define_flags()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config>."
)
_DESCRIBE = flags.DEFINE_boolean(
  "describe", False, "Print config, parameters and level card, and stop."
)
_ALLOW = flags.DEFINE_boolean(
  "allow_config_change", False, "Resume with a config that differs."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder of compiled steps; default in the workdir."
)
_FROM = flags.DEFINE_string(
  "from", "",
  "Another run to start from, if this has no checkpoint: workdir, or "
  "workdir@step.",
)  # fmt: skip
_KEEP = flags.DEFINE_string(
  "keep", "",
  "What of it is kept: weights; optimizer, with all counters, for other data "
  "or a cooldown; all, with the place in the data.",
)  # fmt: skip
# Flags of earlier versions, and the --keep that replaces each.
_BEFORE = (
  (flags.DEFINE_string("resume_from", "", "Now --from, --keep=all."), "all"),
  (flags.DEFINE_string("init_from", "", "Now --from, --keep=weights."),
   "weights"),
)  # fmt: skip
_PREEMPTED = flags.DEFINE_integer(
  "preempted_exit_code", 0, "Exit status after SIGTERM, once the run is saved."
)
_DATA = flags.DEFINE_string(
  "data_dir", os.environ.get("NL_DATA", ""),
  "Folder of the files of eval.tasks; default the variable NL_DATA.",
)  # fmt: skip
_SAMPLE = "sample.txt"
_SAMPLE_TOKENS = 200


def main() -> int:
  """Runs the command; returns its exit status."""
  # Imported here: --list_configs and flag mistakes answer at once.
  import jax

  from nl_jax import build
  from nl_jax.models import flops
  from nl_jax.report import describe
  from nl_jax.train import loop
  from nl_jax.train import origin as origin_lib

  for flag, keep in _BEFORE:
    if flag.value:
      raise ValueError(
        f"--{flag.name}={flag.value} is now --from={flag.value} --keep={keep}"
      )
  origin = origin_lib.parse(_FROM.value, _KEEP.value)
  _refuse_stores()
  if not _DESCRIBE.value:
    distributed.initialize(preemption=True)
  config = build.resolve(flags.FLAGS.config)
  if not _DESCRIBE.value:
    config = build.with_source(config, named.is_given("data.source"))
    if config.data.source != flags.FLAGS.config.data.source:
      command.tell(f"data.source={config.data.source}, as data.path says")
  net = build.model(config)
  optimizer = build.make_optimizer(config, net)
  if distributed.first():
    print(describe.config_text(config))
    print(describe.parameter_table(net))
    print(describe.card_text(config, net, optimizer))
    for group in optimizer.groups:
      print(f"group {group}")
    print(optimizer.chosen(jax.eval_shape(net.init, jax.random.key(0))))
    if walks := describe.walk_text(config, net):
      print(walks)
    if split := describe.sequence_text(config, net):
      print(split)
    print(describe.flops_text(config, net), flush=True)
  if _DESCRIBE.value:
    return command.DONE
  settings, mesh = build.settings(config), build.mesh(config)
  dataset = build.dataset(config, net, mesh)
  evaluate = _with_tasks(
    _evaluation(net, dataset, config.eval.batches, mesh),
    config, net, dataset.tokenizer, mesh,
  )  # fmt: skip
  workdir = _workdir()
  _refuse_foreign_sample(workdir)
  cache = _CACHE.value or str(workdir / "compilation_cache")
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  command.tell(f"data: {dataset.describe()}")
  command.tell(describe.batch_text(dataset))
  command.tell(f"mesh: {dict(mesh.shape)}; workdir: {workdir}")
  distributed.check_same("config", describe.config_text(config))
  distributed.check_same("data", dataset.fingerprint)
  distributed.check_same("workdir", str(workdir))
  result = loop.train(
    model=net,
    optimizer=optimizer,
    data=dataset.train,
    batch_size=config.data.batch_size,
    sequence_length=config.data.sequence_length,
    workdir=str(workdir),
    config=build.plain(config),
    settings=settings,
    fingerprint=dataset.fingerprint,
    mesh=mesh,
    evaluate=evaluate,
    allow_config_change=_ALLOW.value,
    origin=origin,
    flops_per_token=flops.training(net, config.data.sequence_length),
  )
  if result.status == "interrupted":
    command.say(f"stopped at step {result.step}; the same command resumes")
    return command.INTERRUPTED
  if result.status == "preempted":
    command.tell(f"saved at step {result.step}; the same command resumes")
    return _PREEMPTED.value
  params = build.gathered(result.state["params"])
  if distributed.first():
    params = jax.device_put(params, jax.local_devices()[0])
    _finish(net, params, dataset, workdir, result.metrics)
  return command.DONE


def _refuse_stores() -> None:
  """pathlib would make a folder `gs:` here."""
  for flag in (_WORKDIR, _FROM):
    if "://" in (flag.value or ""):
      raise ValueError(
        f"--{flag.name}={flag.value} is in a store, and a run renames, appends "
        "and locks in a folder; mount the bucket (gcsfuse, as "
        "experiments/launch does: docs/launch.md), or give a disk"
      )


def _workdir() -> pathlib.Path:
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  name = named.chosen_name()
  workdir = pathlib.Path("runs") / name.replace(":", "_").replace(os.sep, "_")
  command.tell(f"no --workdir: this run lives in {workdir}")
  return workdir


def _refuse_foreign_sample(workdir: pathlib.Path) -> None:
  """The loop keeps its own files; sample.txt is this command's."""
  if not (workdir / "config.json").exists():
    if (workdir / _SAMPLE).exists():
      raise ValueError(
        f"{workdir} holds {_SAMPLE} but no run; give another --workdir or move "
        "the file away"
      )


def _evaluation(
  net: Any, dataset: Any, batches: int, mesh: Any
) -> Callable[[Any, int], Mapping[str, float]]:
  """(params, step) -> validation loss, in nat per token and per byte."""
  import jax

  from nl_jax import sharding
  from nl_jax.train import step as step_lib

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    loss, (weight, _) = step_lib.loss_sum(params, net, batch)
    return loss, weight

  def evaluate(params: Any, step: int) -> Mapping[str, float]:
    del step
    total = weight = 0.0
    for rows in dataset.validation(batches):
      batch = step_lib.on_mesh(rows, mesh, dataset.batch_size)
      loss, count = sums(params, batch)
      total, weight = total + float(loss), weight + float(count)
    counts = dataset.counts["validation"]
    loss = total / weight
    return {
      "eval/validation/loss": loss,
      "eval/validation/ppl": float(np.exp(min(loss, 700.0))),
      # Over the split: bytes of the rows evaluated are not counted one by one.
      "eval/validation/nat_per_byte": loss * counts.tokens / counts.bytes,
    }

  return evaluate


def _with_tasks(
  evaluate: Callable[[Any, int], Mapping[str, float]],
  config: Any,
  net: Any,
  tokenizer: Any,
  mesh: Any,
) -> Callable[[Any, int], Mapping[str, float]]:
  """The evaluation, and after it the tasks of eval.tasks."""
  from nl_jax.eval import evaluate as tasks_lib

  tasks = tasks_lib.parse(config.eval.tasks)
  if not tasks:
    return evaluate
  from experiments.table1 import training
  from nl_jax import build

  size = build.tokens_per_step(config) // config.train.accumulate
  score = training.make(tasks, _DATA.value, net, tokenizer, mesh, size)
  return lambda params, step: {**evaluate(params, step), **score(params)}


def _finish(
  net: Any,
  params: Any,
  dataset: Any,
  workdir: pathlib.Path,
  metrics: Mapping[str, float],
) -> None:
  """A sample of text, the result, and where to look next."""
  import jax

  from experiments.cli import generation
  from nl_jax import files, stream

  prompt = generation.opening(dataset)
  size = generation.encode(dataset.tokenizer, prompt).size
  mesh = stream.mesh_of(net, params, jax.local_devices())
  reader = stream.start(net, params, length=size + _SAMPLE_TOKENS, mesh=mesh)
  text = prompt + "".join(
    generation.generate(reader, dataset.tokenizer, prompt, _SAMPLE_TOKENS)
  )
  with files.writing(workdir / _SAMPLE):
    files.write(workdir / _SAMPLE, text)
  logging.flush()
  print("\n--- sample, after " + repr(prompt) + " ---")
  print(text)
  print("-" * 72)
  report = _report_or_why_not(workdir)
  loss = metrics.get("eval/validation/nat_per_byte")
  if loss is not None:
    print(f"validation: {loss:.4f} nat per byte")
  folder = shlex.quote(str(workdir))
  print(f"metrics:    {workdir}/metrics.jsonl, tensorboard --logdir {folder}")
  print(f"results:    {workdir}/results.json")
  print(f"report:     {report}")
  print(
    "more text:  python -m experiments.sample "
    f"--workdir={folder} --prompt='def '"
  )


def _report_or_why_not(workdir: pathlib.Path) -> str:
  """Draws the run; a report that cannot be drawn is no reason to fail."""
  from nl_jax.report import folder

  try:
    return str(folder.write([str(workdir)], workdir)[0])
  except (ModuleNotFoundError, OSError, ValueError) as error:
    return f"not drawn: {error}"


if __name__ == "__main__":
  command.run(main)
