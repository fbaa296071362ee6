"""What the TPU's compiler writes of each program: bundles and their slots.

A bundle is what a core issues in one cycle. The compiler's schedule of a
kernel, or of an operation of XLA, is a list of them; a slot of a bundle holds
an instruction of one unit. Neither waits for memory nor transfers are in it.
"""

import pathlib
import re
from typing import NamedTuple

_FILE = re.compile(r"\d+-(?P<name>.+)-\d\d-(?P<kind>\D.*)\.txt$")
_SCHEDULE = "schedule-analysis_final_bundles"
_USE = "final_hlo-static-per-bundle-utilization"
_TOTAL = "total scheduled bundles"
SLOTS = ("MXU", "VALU", "XLU", "VSTORE")
_FILLS = ("VLOAD:FILL", "VSTORE:SPILL")


class Schedule(NamedTuple):
  """The schedule of a kernel or an operation.

  Attributes:
    bundles: all of them, loops once.
    empty: of these, without an instruction.
    slots: share of the slots of a unit that are used.
    spills: registers written to and read from VMEM for want of others, a
      bundle.
  """

  bundles: int
  empty: int
  slots: dict[str, float]
  spills: float


def arguments(folder: pathlib.Path) -> str:
  """LIBTPU_INIT_ARGS that let the compiler write schedules into a folder."""
  wanted = ".*final_bundles|.*final_hlo-static.*"  # All would be 94 MB.
  return (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    f"--xla_jf_dump_llo_pass_label_regex={wanted}"
  )


def read(folder: pathlib.Path) -> dict[str, Schedule]:
  """Schedules by the operation's name in the compiled program's text.

  The files are removed, so that the next program finds none.
  """
  texts: dict[str, dict[str, str]] = {}
  for path in sorted(folder.iterdir()):
    match = _FILE.match(path.name)
    if match and match["kind"] in (_SCHEDULE, _USE):
      texts.setdefault(match["name"], {})[match["kind"]] = path.read_text()
    path.unlink()
  found = {}
  for name, kinds in texts.items():
    analysis = kinds.get(_SCHEDULE, "")
    if _TOTAL in analysis:  # What moves data only has none.
      found[name] = schedule(analysis, kinds.get(_USE, ""))
  return found


def schedule(analysis: str, use: str) -> Schedule:
  """A schedule from its two texts.

  Args:
    analysis: with the number of bundles.
    use: line 2 names the slots, line 3 has how many a bundle has, then comes
      a line a bundle; may be empty.

  Raises:
    ValueError: no number of bundles.
  """
  number = lambda what: re.search(rf"{what} scheduled bundles:\s+(\d+)",
                                  analysis)  # fmt: skip
  total, empty = number("total"), number("empty")
  if total is None:
    raise ValueError("expected a schedule of the compiler, got no bundles")
  sums, capacity, rows = _sums(use)
  share = {
    slot: round(sums[slot] / (capacity[slot] * rows), 3)
    for slot in SLOTS if slot in sums
  }  # fmt: skip
  spills = sum(sums.get(slot, 0) for slot in _FILLS) / max(rows, 1)
  return Schedule(
    int(total[1]), int(empty[1]) if empty else 0, share, round(spills, 3)
  )


def _sums(use: str) -> tuple[dict[str, int], dict[str, int], int]:
  """(instructions by slot, slots of a bundle, bundles)."""
  lines = use.splitlines()
  if len(lines) < 5:
    return {}, {}, 0
  names = [name.strip() for name in lines[1].split(",")]
  capacity = dict(zip(names, map(int, lines[2].split())))
  rows = [line.split() for line in lines[4:] if line[:1].isdigit()]
  columns = zip(*rows) if rows else [[] for _ in names]
  sums = {name: sum(map(int, c)) for name, c in zip(names, columns)}
  return sums, capacity, len(rows)
