"""Tries random and adversarial configs, damaged files and orders of commands.

    python -m experiments.fuzz --seed=0
    python -m experiments.fuzz --seed=7 --configs=20 --files=0 --commands=0

Every case is run apart. It must end by itself, with status 0 and what is right
or with status 1 or 2 and one sentence: no traceback, no signal, no damage that
is taken for what was written. Prints a table in Markdown and each case that
went wrong, with what makes it again; status 3 if one did.
"""

import pathlib
import random
import tempfile

from absl import flags

from experiments.cli import command

_SEED = flags.DEFINE_integer("seed", 0, "Seed of all cases.", lower_bound=0)
_CONFIGS = flags.DEFINE_integer(
  "configs", 300, "Random and adversarial configs.", lower_bound=0
)
_FILES = flags.DEFINE_integer("files", 200, "Damaged files.", lower_bound=0)
_COMMANDS = flags.DEFINE_integer(
  "commands", 40, "Commands in any order, on the same few folders.",
  lower_bound=0,
)  # fmt: skip
_SHAPES = flags.DEFINE_boolean(
  "shapes", True, "Trace what configs make, not only build it."
)
_KINDS = flags.DEFINE_list(
  "kinds", [], "Kinds of files, with commas between; by default all."
)


def main() -> int:
  """Runs the command; returns its exit status."""
  import jax

  jax.config.update("jax_platforms", "cpu")

  with tempfile.TemporaryDirectory() as folder:
    results = _run(pathlib.Path(folder), _SEED.value)
  print(table(results))
  wrong = [x for x in results if x.fault]
  for x in wrong:
    print(f"\n{x.kind}: {x.what}\n  {x.fault}: {x.said}")
  return command.PARTLY_FAILED if wrong else command.DONE


def _run(folder: pathlib.Path, seed: int) -> list:
  """Runs what the flags ask for; the results, in order.

  Args:
    folder: for whole files and the folders of commands.
    seed: of all that is drawn.

  Raises:
    ValueError: a kind that there is not.
  """
  from experiments.fuzz import commands, configs, files, run

  kinds = _KINDS.value or [*files.KINDS]
  for name in kinds:
    if name not in files.KINDS:
      raise ValueError(
        f"--kinds must be of {', '.join(files.KINDS)}; got {name!r}"
      )
  draw = lambda what: random.Random(f"{what} {seed}")
  cases = configs.cases(_CONFIGS.value, draw("configs"), _SHAPES.value)
  if _FILES.value:
    whole = folder / "whole"
    whole.mkdir()
    making = run.Case("files", "made", lambda: _made(whole), 300)
    made = run.run(making)
    if made.fault or made.status:
      raise ValueError(f"the whole files were not made: {made.said}")
    cases += files.cases(_FILES.value, whole, draw("files"), kinds)
  if _COMMANDS.value:
    there = folder / "commands"
    cases += commands.cases(_COMMANDS.value, there, draw("commands"))
  results = []
  for case in cases:
    results.append(run.run(case))
    _told(results[-1])
  return results


def _made(whole: pathlib.Path) -> str:
  from experiments.fuzz import files

  files.make(whole)
  return "made"


def _told(result) -> None:
  mark = "WRONG" if result.fault else "took" if not result.status else "said"
  command.say(f"{mark} {result.kind} {result.what}: {result.said}")


def table(results: list) -> str:
  """Cases by kind, as a table in Markdown."""
  lines = [
    "| what | cases | taken, and right | one sentence | wrong |",
    "|---|---|---|---|---|",
  ]
  for kind in dict.fromkeys(x.kind for x in results):
    own = [x for x in results if x.kind == kind]
    lines.append(_row(kind, own))
  return "\n".join([*lines, _row("all", results)])


def _row(name: str, results: list) -> str:
  wrong = sum(bool(x.fault) for x in results)
  taken = sum(not x.fault and not x.status for x in results)
  return (
    f"| {name} | {len(results)} | {taken} | {len(results) - wrong - taken} | "
    f"{wrong} |"
  )


if __name__ == "__main__":
  command.run(main)
