"""Draws a run, or several side by side, as a picture and a page.

    python -m experiments.report --workdir=runs/hope_tiny
    python -m experiments.report --workdir=runs/a --compare=runs/b,runs/c

Writes report.png and report.html into --out, the first workdir by default. A
run writes its own at its end; one that is under way can be drawn, too.
"""

import pathlib

from absl import flags

from experiments.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_COMPARE = flags.DEFINE_list("compare", [], "Folders of further runs.")
_OUT = flags.DEFINE_string("out", "", "Folder to write to.")


def main() -> int:
  """Runs the command; returns its exit status."""
  from nl_jax.report import folder

  if not _WORKDIR.value:
    raise ValueError("--workdir is required: the folder of a run")
  out = pathlib.Path(_OUT.value or _WORKDIR.value)
  for path in folder.write([_WORKDIR.value, *_COMPARE.value], out):
    print(path)
  return command.DONE


if __name__ == "__main__":
  command.run(main)
