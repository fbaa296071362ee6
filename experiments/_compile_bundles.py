"""Bundles of each operation of a program, each as often as its loop turns.

The compiler writes the schedule of an operation, or of a kernel, as a list of
bundles, one a cycle of a core. Labels say where a loop begins, marks how many
loops a bundle is in, and the test at its end how often it turns: the grid of a
kernel is such a loop. What waits for memory or transfers is not in it.
"""

import pathlib
import re
from typing import NamedTuple

_FILE = re.compile(r"\d+-(?P<name>.+)-\d\d-final_bundles\.txt$")
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s*([A-Z]{2})?\s*:\s*([> ]*)\{(.*)")
_TURNS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_SKIP = re.compile(r"sbr\.rel \(%\w+\) target = \$region(\d+)")
_BEGIN = re.compile(r"Start(?:/End empty)? region (\d+)\b")


class Schedule(NamedTuple):
  """Bundles of an operation.

  Attributes:
    bundles: all, loops by their turns.
    always: of a kernel, what each step of its grid runs.
    maybe: of a kernel, the parts that a step may leave out, as if no step did;
      a loop within one counts once.
    open: loops whose turns the text does not tell, counted once.
  """

  bundles: float
  always: float
  maybe: float
  open: int


class _Bundle(NamedTuple):
  """A line: where it stands, and what of the flow of control is in it.

  Attributes:
    begins: it is the first of a loop.
    depth: of loops around it.
    empty: no instruction is in it.
    ends: it tests whether a loop ends.
    turns: of that loop; None where it is not a number.
    skips: the region that a condition may go on with, or None.
    regions: that begin here.
  """

  begins: bool
  depth: int
  empty: bool
  ends: bool
  turns: int | None
  skips: str | None
  regions: tuple[str, ...]


def read(folder: pathlib.Path) -> dict[str, Schedule]:
  """Schedules of a program by the names of its operations; files stay."""
  return {
    match["name"]: schedule(path.read_text())
    for path in sorted(folder.iterdir())
    if (match := _FILE.match(path.name))
  }


def schedule(text: str) -> Schedule:
  """The schedule of an operation.

  Args:
    text: a line a bundle, as the compiler writes it.
  """
  bundles = [made for line in text.splitlines() if (made := _bundle(line))]
  maybe = [level > 1 for level in _conditions(bundles)]
  turns, steps, unknown = [1] * len(bundles), [1] * len(bundles), 0
  for begin, end in _loops(bundles):
    depth = bundles[begin].depth
    known = [b.turns for b in bundles[begin:end] if b.ends and b.depth == depth]
    if len(known) != 1 or known[0] is None:
      unknown += 1
      continue
    for i in range(begin, end):
      turns[i] *= known[0]
      steps[i] *= 1 if maybe[begin] else known[0]
  always = sum(n for n, m in zip(steps, maybe) if not m)
  return Schedule(sum(turns), always, sum(steps) - always, unknown)


def _bundle(line: str) -> _Bundle | None:
  match = _BUNDLE.match(line)
  if match is None:
    return None
  test, skip = _TURNS.search(line), _SKIP.search(line)
  return _Bundle(
    begins=match[1] == "LB",
    depth=match[2].count(">"),
    empty=match[3].startswith("}"),
    ends="loop exit test" in line,
    turns=int(test[1]) if test else None,
    skips=skip[1] if skip else None,
    regions=tuple(_BEGIN.findall(line)),
  )


def _loops(bundles: list[_Bundle]) -> list[tuple[int, int]]:
  """First bundle of each loop, and the one after its last."""
  found, open_loops = [], []
  for i, bundle in enumerate(bundles):
    if bundle.empty and not bundle.depth:
      continue  # Empty bundles have no marks.
    while open_loops and (
      bundle.depth < bundles[open_loops[-1]].depth
      or (bundle.begins and bundle.depth <= bundles[open_loops[-1]].depth)
    ):
      found.append((open_loops.pop(), i))
    if bundle.begins:
      open_loops.append(i)
  return found + [(begin, len(bundles)) for begin in open_loops]


def _conditions(bundles: list[_Bundle]) -> list[int]:
  """How many conditions may leave a bundle out.

  The first of a kernel's is whether its pipeline is being filled or emptied.
  """
  first = {}
  for i, bundle in enumerate(bundles):
    for region in bundle.regions:
      first.setdefault(region, i)
  level = [0] * len(bundles)
  for i, bundle in enumerate(bundles):
    for j in range(i + 1, first.get(bundle.skips, 0)):
      level[j] += 1
  return level
