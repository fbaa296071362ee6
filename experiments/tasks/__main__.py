"""Needles, recall and formal languages: synthetic tests of a memory.

    python -m experiments.tasks --task=niah_single_1 --workdir=runs/hope_tiny
    python -m experiments.tasks --task=mqar --config=gated_deltanet_tiny
    python -m experiments.tasks --task=languages

Needles (RULER) are hidden in a haystack and asked for: scores of a trained run
by depth and length, as JSON and as a picture; with --config instead of
--workdir, of a model that learns from other questions of the first length and
nothing else. Recall (MQAR) and formal
languages train a model from scratch and test it: that of --config, with changes
of its switches by --config.model.<…>=<value>, or without one all that are
compared. A trial is a JSON file in --folder; one that is there is not run
again, and the table shows all of the same sizes.
"""

import dataclasses
import difflib
import pathlib
from typing import Any

from absl import flags

from experiments.cli import command, named

named.define_config(required=False)
_TASK = flags.DEFINE_string("task", "", "Which; --task=list names all.")
_PRESET = flags.DEFINE_enum(
  "preset", "small", ["smoke", "small", "paper"], "Sizes of recall, languages."
)
_FOLDER = flags.DEFINE_string(
  "folder", "", "Results; default runs/tasks, of needles <workdir>/tasks."
)
_TABLE = flags.DEFINE_string("table", "", "Write the table (Markdown) here.")
_LENGTHS = flags.DEFINE_list(
  "lengths", None, "Tokens: of needles' prompts, of recall's rows."
)
# Recall and languages.
_PAIRS = flags.DEFINE_list("pairs", None, "Recall: pairs of a row.")
_VOCABULARY = flags.DEFINE_integer("vocab_size", None, "Recall: ids.")
_TRAIN = flags.DEFINE_integer("train", None, "Rows to learn from.")
_TEST = flags.DEFINE_integer("test", None, "Rows of a test, at most.")
_STEPS = flags.DEFINE_integer("steps", None, "Updates of a trial, at most.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Rows of a step.")
_EVERY = flags.DEFINE_integer("eval_every", None, "Steps between two tests.")
_RATES = flags.DEFINE_list("learning_rates", None, "Each is a trial.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many of each trial.")
# Needles.
_WORKDIR = flags.DEFINE_string("workdir", "", "Needles: a trained run.")
_DEPTHS = flags.DEFINE_list(
  "depths", None, "Needles: percent of the text before; drawn: as RULER does."
)
_SAMPLES = flags.DEFINE_integer(
  "samples", 20, "Needles: questions a cell (RULER: 500).", lower_bound=1
)
_AT_ONCE = flags.DEFINE_integer(
  "at_once", 10, "Needles: questions that are read at once.", lower_bound=1
)
_NEW_TOKENS = flags.DEFINE_integer(
  "new_tokens", 128, "Needles: tokens of an answer, at most.", lower_bound=1
)
_HAYSTACK = flags.DEFINE_string(
  "haystack", "", "Needles: UTF-8 file of the text; default: Python's library."
)
_SEED = flags.DEFINE_integer(
  "seed", 42, "Needles: seed of all questions.", lower_bound=0
)

_ALL_LANGUAGES = "languages"
_OF_NEEDLES = (
  "workdir", "depths", "samples", "at_once", "new_tokens", "haystack", "seed",
)  # fmt: skip
_OF_TRAINING = (
  "train", "test", "steps", "batch_size", "eval_every", "learning_rates",
)  # fmt: skip
_OF_TRIALS = ("preset", "pairs", "vocab_size", "seeds")


def main() -> int:
  """Runs the command; returns its exit status."""
  # Imported here: a mistake in the flags answers at once.
  from nl_jax.tasks import languages, needles

  groups = {
    "needles": list(needles.TASKS),
    "recall": ["mqar"],
    "languages": [_ALL_LANGUAGES, *languages.LANGUAGES],
  }
  if _TASK.value == "list":
    for group, names in groups.items():
      print(f"{group}: {', '.join(names)}")
    return command.DONE
  name = _known_task([name for names in groups.values() for name in names])
  if name in groups["needles"]:
    _refuse(_OF_TRIALS, "recall and languages")
    return _needles(name)
  _refuse(_OF_NEEDLES, "needles")
  if name != "mqar":
    _refuse(("lengths", "pairs", "vocab_size"), "other tasks")
  tasks = list(languages.LANGUAGES) if name == _ALL_LANGUAGES else [name]
  return _trials(tasks)


def _trials(tasks: list[str]) -> int:
  """Trains and tests on recall or languages; prints the table."""
  from experiments.tasks import arms, problems, tables, trials

  size = _sizes(problems.sizes(tasks[0], _PRESET.value))
  folder = pathlib.Path(_FOLDER.value or "runs/tasks")
  _keep_compiled(folder)
  for task in tasks:
    if flags.FLAGS["config"].present:
      compared = (arms.chosen(named.chosen_name(), flags.FLAGS.config),)
    else:
      compared = arms.compared(task, _PRESET.value)
    trials.run(task, compared, size, folder)
  found = {task: trials.known(task, size, folder) for task in tasks}
  if tasks == [problems.MQAR]:
    text = tables.mqar(found[problems.MQAR], size)
  else:
    text = tables.formal(found, size)
  return _show(text)


def _needles(name: str) -> int:
  """Asks a trained run, or a model trained for it, for needles."""
  from experiments.tasks import arms, heatmap, problems, tables
  from experiments.tasks import needles as asking

  trained, config = _WORKDIR.value, flags.FLAGS["config"].present
  if bool(trained) == bool(config):
    raise ValueError(
      "--workdir is required: the folder of a trained run; or --config, of a "
      "model that learns this task alone"
    )
  workdir = pathlib.Path(trained or "runs")
  if trained and not workdir.is_dir():
    raise ValueError(f"no folder {workdir}: give the --workdir of a run")
  asked = asking.Asked(
    name,
    lengths=_numbers("lengths", int) or (1024, 2048, 4096),
    depths=_depths(),
    samples=_SAMPLES.value,
    new_tokens=_NEW_TOKENS.value,
    seed=_SEED.value,
  )
  folder = pathlib.Path(_FOLDER.value or workdir / "tasks")
  _keep_compiled(folder)
  haystack = asking.haystack(name, _HAYSTACK.value)
  if trained:
    _refuse(_OF_TRAINING, "models that are trained here")
    subject = asking.load(workdir)
  else:
    arm = arms.chosen(named.chosen_name(), flags.FLAGS.config)
    subject = asking.learned(arm, asked, haystack, _sizes(problems.NEEDLES))
  result, path = asking.run(subject, asked, haystack, folder, _AT_ONCE.value)
  picture = path.with_suffix(".png")
  heatmap.draw(result, picture)
  status = _show(tables.needles(result))
  print(f"results: {path}\npicture: {picture}")
  return status


def _keep_compiled(folder: pathlib.Path) -> None:
  """Programs are compiled once a folder, where the user has no cache."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    cache = str(folder / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)


def _show(text: str) -> int:
  print(text)
  if _TABLE.value:
    pathlib.Path(_TABLE.value).write_text(text + "\n", encoding="utf-8")
  return command.DONE


def _sizes(preset: Any) -> Any:
  """Sizes, with those of the flags that were given."""
  given = {
    "train": _TRAIN.value, "test": _TEST.value, "steps": _STEPS.value,
    "batch_size": _BATCH.value, "eval_every": _EVERY.value,
    "seeds": _SEEDS.value, "vocab_size": _VOCABULARY.value,
    "learning_rates": _numbers("learning_rates", float),
    "lengths": _numbers("lengths", int), "pairs": _numbers("pairs", int),
  }  # fmt: skip
  given = {k: v for k, v in given.items() if v is not None and v != ()}
  return dataclasses.replace(preset, **given)


def _numbers(flag: str, kind: type) -> tuple:
  """The numbers of a list flag; () where it is not given."""
  values = flags.FLAGS[flag].value
  try:
    return tuple(kind(value) for value in values or ())
  except ValueError:
    raise ValueError(
      f"--{flag} takes numbers with commas between, got {','.join(values)!r}"
    ) from None


def _depths() -> tuple[float, ...] | None:
  """Of --depths; None: drawn. () is what the task takes by itself."""
  if _DEPTHS.value == ["drawn"]:
    return None
  return _numbers("depths", float)


def _known_task(known: list[str]) -> str:
  name = _TASK.value
  if name in known:
    return name
  close = difflib.get_close_matches(name, known)
  hint = f"Did you mean {' or '.join(close)}? " if close else ""
  what = f"no task {name!r}. " if name else "--task is required. "
  raise ValueError(f"{what}{hint}Known: {', '.join(known)}")


def _refuse(names: tuple[str, ...], whose: str) -> None:
  """Raises ValueError for a flag that the task would not look at."""
  given = [f"--{name}" for name in names if flags.FLAGS[name].present]
  if given:
    raise ValueError(
      f"--task={_TASK.value} does not take {', '.join(given)}, of {whose}"
    )


if __name__ == "__main__":
  command.run(main)
