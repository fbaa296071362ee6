"""Scores Table 1 with a trained model, beside the published row.

    python -m experiments.table1 --workdir=runs/hope_tiny --data_dir=data

The folder holds a file a task, `<task>.jsonl`, with the columns of its data set
on Hugging Face; the nine tasks are scored zero-shot through the seqio mixture
`nl_table1`, with the numbers of lm-evaluation-harness. The table is printed and
kept in --out with all that it depends on. Exit status: 0 every task was scored;
3 some failed, which the table says; 1 none was scored.

Several processes, as on the workers of a slice, score together: each is started
with the command (experiments/distributed.py), and the first one prints and
writes.

With --config=<name> in the place of --workdir the weights are random: what
chance is.
"""

import os
import pathlib
import shlex
import sys

from absl import flags, logging

from experiments.cli import command, distributed, named

named.define_config(required=False)
distributed.define_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_DATA = flags.DEFINE_string(
  "data_dir", os.environ.get("NL_DATA", ""),
  "Folder of the tasks' files; default the variable NL_DATA.",
)  # fmt: skip
_STEP = flags.DEFINE_list(
  "step", ["latest"], "Which checkpoint; several give a result file each."
)
_TASKS = flags.DEFINE_list("tasks", [], "Some of the nine; default all.")
_LIMIT = flags.DEFINE_integer(
  "limit", 0, "Documents a task; 0: all.", lower_bound=0
)
_BOS = flags.DEFINE_enum(
  "bos", "none", ("none", "always"), "The beginning before every request."
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", 4096, "Tokens of a request that are read.", lower_bound=1
)
_WINDOWS = flags.DEFINE_list(
  "wiki_max_length", [],
  "Windows of WikiText, the first is shown; default the trained length, and "
  "2048 below a longer one.",
)  # fmt: skip
_BATCH = flags.DEFINE_integer(
  "batch_tokens", 65536, "Tokens of a batch, padding included.", lower_bound=1
)
_MEMORISE = flags.DEFINE_enum(
  "memorise", "none", ("none", "prompt"),
  "prompt: levels that learn from the task loss learn the prompt, never the "
  "answer; marked in the table.",
)  # fmt: skip
_REFERENCE = flags.DEFINE_enum(
  "reference", "neurips", ("neurips", "arxiv", "none"),
  "Version of the paper whose row is shown.",
)  # fmt: skip
_ALL = flags.DEFINE_list("all", [], "Result files of other runs to show below.")
_SAMPLES = flags.DEFINE_boolean(
  "save_samples", False, "Keep samples/<task>.jsonl, a line a document."
)
_OUT = flags.DEFINE_string(
  "out", "", "The result file; default table1_<step>.json in the workdir."
)


def main() -> int:
  """Runs the command; returns its exit status."""
  if bool(_WORKDIR.value) == bool(flags.FLAGS["config"].present):
    raise ValueError(
      "give --workdir, the folder of a trained run, or --config=<name> for "
      "random weights"
    )
  data_dir = os.path.expanduser(_DATA.value)
  if not pathlib.Path(data_dir or " ").is_dir():
    raise ValueError(
      f"no folder --data_dir={_DATA.value}: give the folder with the files of "
      "the tasks, <task>.jsonl"
    )
  command.tell("loading JAX, TensorFlow and the tasks, about ten seconds ...")
  distributed.initialize()
  from experiments.table1 import result, score
  from nl_jax.eval import evaluate

  evaluate.check_names(_TASKS.value)
  score.require_seqio()
  asked = result.Asked(
    workdir=_WORKDIR.value or "",
    data_dir=data_dir,
    tasks=tuple(_TASKS.value),
    limit=_LIMIT.value,
    bos=_BOS.value,
    max_length=_MAX_LENGTH.value,
    windows=_windows(),
    batch_tokens=_BATCH.value,
    memorise=_MEMORISE.value,
    reference=_REFERENCE.value,
    samples=_SAMPLES.value,
    out=_OUT.value,
    command=shlex.join(["python", "-m", "experiments.table1", *sys.argv[1:]]),
  )
  steps = _steps()
  others = [result.read(path) for path in _ALL.value]
  logging.set_verbosity(logging.WARNING)
  found = {score.run(asked, step, _chosen(), others) for step in steps}
  return found.pop() if len(found) == 1 else command.PARTLY_FAILED


def _chosen() -> tuple[str, object] | None:
  """Name and config of --config, where it was given."""
  if _WORKDIR.value:
    return None
  return named.chosen_name(), flags.FLAGS.config


def _steps() -> list[int | None]:
  """The checkpoints asked for; None is the newest."""
  for step in _STEP.value:
    if step != "latest" and not step.isdigit():
      raise ValueError(f"--step must be a number or latest, got {step!r}")
  if len(_STEP.value) > 1 and (_OUT.value or _SAMPLES.value):
    raise ValueError("--out and --save_samples are of one --step; give one")
  return [None if step == "latest" else int(step) for step in _STEP.value]


def _windows() -> tuple[int, ...]:
  try:
    return tuple(map(int, _WINDOWS.value))
  except ValueError:
    raise ValueError(
      "--wiki_max_length must be whole numbers with commas between, got "
      f"{','.join(_WINDOWS.value)!r}"
    ) from None


if __name__ == "__main__":
  command.run(main)
