"""Writes a report: the runs, their level cards, the charts, the page."""

import pathlib

from nl_jax import build
from nl_jax.report import charts
from nl_jax.report import page as page_lib
from nl_jax.report import runs as runs_lib
from nl_jax.train import files

PICTURE = "report.png"
PAGE = "report.html"


def write(workdirs: list[str], out: pathlib.Path) -> list[pathlib.Path]:
  """Draws runs into a folder; an earlier report there is replaced.

  Args:
    workdirs: folders of the runs.
    out: made if missing.

  Returns:
    The paths of the page and of the picture.

  Raises:
    ValueError: a folder without a run.
    StorageError: the folder cannot be written.
  """
  runs = runs_lib.named_apart([runs_lib.read(folder) for folder in workdirs])
  shown = charts.panels(runs)
  page = page_lib.page(runs, shown, [_card(run) for run in runs])
  files.make_workdir(out)
  files.replace(out / PAGE, page)
  charts.save(shown, " · ".join(run.name for run in runs), out / PICTURE)
  return [out / PAGE, out / PICTURE]


def _card(run: runs_lib.Run) -> str:
  """The level card, or why it cannot be drawn."""
  from nl_jax.report import describe

  try:
    config = build.from_plain(run.config)
    net = build.model(config)
    made = build.make_optimizer(config, net)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    return f"not drawn: this version does not read the run's config ({error})"
  return describe.card_text(config, net, made)
