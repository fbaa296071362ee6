"""Where a run starts from: a checkpoint of another run, and what of it is kept.

`weights` takes the parameters alone. `optimizer` takes all of its state along,
slow momenta, clocks and what waits in them, and the counters of steps and
tokens; the data begin at their first row: another corpus, one that has grown, a
cooldown. `all` takes the place in the data too.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nl_jax.train import checkpoint, files, state

WEIGHTS, OPTIMIZER, ALL = KEEPS = ("weights", "optimizer", "all")


class Origin(NamedTuple):
  """A checkpoint to start from.

  Attributes:
    workdir: of the other run.
    keep: one of `KEEPS`.
    step: which checkpoint; None: the newest that can be read.
  """

  workdir: str
  keep: str
  step: int | None = None


def parse(place: str, keep: str) -> Origin | None:
  """The origin that two flags name; None where there is none.

  Args:
    place: a workdir, or workdir@step; "": none.
    keep: one of `KEEPS`; "": not said.

  Raises:
    ValueError: one without the other, or a word that is not known.
  """
  if not place and not keep:
    return None
  if not place:
    raise ValueError(f"--keep={keep} belongs to --from=<workdir>")
  if keep not in KEEPS:
    said = f", got {keep!r}" if keep else ""
    raise ValueError(
      "--from needs --keep, which is weights, optimizer (and counters), or "
      f"all (and the place in the data){said}"
    )
  folder, at, step = place.rpartition("@")
  if at and step.isdecimal() and not pathlib.Path(place).is_dir():
    return Origin(folder, keep, int(step))
  return Origin(place, keep)


def check(origin: Origin, workdir: str, fingerprint: str, like: Any) -> None:
  """Finds early that a run cannot start from an origin.

  Args:
    origin: what was asked for.
    workdir: of the new run, which has no checkpoint.
    fingerprint: of its data.
    like: its abstract state.

  Raises:
    ValueError: no checkpoint there, or of another model, optimizer or data.
  """
  there = pathlib.Path(origin.workdir)
  if there.resolve() == pathlib.Path(workdir).resolve():
    raise ValueError(
      f"--from={origin.workdir} is the --workdir itself; give another --workdir"
    )
  try:
    params_only = origin.keep == WEIGHTS
    checkpoint.check_origin(
      origin.workdir,
      like,
      params_only=params_only,
      step=origin.step,
      without=without(origin),
    )
  except checkpoint.LeavesMismatchError as error:
    if params_only:
      raise
    raise checkpoint.LeavesMismatchError(
      f"{error}, or --keep=weights, which takes its parameters alone"
    ) from error
  if origin.keep == ALL:
    before = files.read_about(there)["fingerprint"]
    check_data(origin, before, fingerprint)


def without(origin: Origin) -> str:
  """The branch of a state that is not taken along; "": all of it is.

  What streams carry is of the documents that they are in.
  """
  return "" if origin.keep == ALL else state.CARRIED


def check_data(origin: Origin, before: str, now: str) -> None:
  """Raises ValueError where a place in the data would mean another one."""
  if before != now:
    raise ValueError(
      f"{origin.workdir} was trained on other data ({before[:12]}, now "
      f"{now[:12]}), where its place means nothing; --keep=optimizer keeps all "
      "else and begins these data at their first row"
    )


def chain(origin: Origin, step: int) -> list[dict[str, Any]]:
  """What a run comes from, oldest first, for its config.json.

  Args:
    origin: of the run.
    step: of the checkpoint that was taken.
  """
  about = files.read_about(pathlib.Path(origin.workdir))
  data = about["config"].get("data", {})
  return [
    *about.get(files.CHAIN, ()),
    {
      "workdir": origin.workdir,
      "step": step,
      "keep": origin.keep,
      "source": data.get("source", ""),
      "path": data.get("path", ""),
      "fingerprint": about["fingerprint"],
    },
  ]


def describe(entry: Mapping[str, Any]) -> str:
  """One entry of a chain in words."""
  data = " ".join(x for x in (entry["source"], entry["path"]) if x)
  trained = f", trained on {data}" if data else ""
  return (
    f"from step {entry['step']} of {entry['workdir']}{trained}; kept: "
    f"{entry['keep']}"
  )
