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
_COMPARE = r"%(\w+) = scmp\.{}\.s32\.totalorder %(\w+), (\d+)"
_TURNS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit")
_FROM, _UNTIL = (re.compile(_COMPARE.format(op)) for op in ("ge", "lt"))
_NOT_BOTH = re.compile(r"%(\w+) = pnand %(\w+), %(\w+)")
_SKIP = re.compile(r"sbr\.rel \(%(\w+)\) target = \$region(\d+)")
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
    skips: (predicate, region) of a condition on which that region comes next.
    regions: that begin here.
  """

  begins: bool
  depth: int
  empty: bool
  ends: bool
  turns: int | None
  skips: tuple[str, str] | None
  regions: tuple[str, ...]


class _Part(NamedTuple):
  """Bundles that a condition may leave out.

  Attributes:
    begin, end: their indices.
    turns: of the loop around, in which they run: those of a pipeline that is
      neither being filled nor emptied. None: not known.
  """

  begin: int
  end: int
  turns: int | None


def arguments(folder: pathlib.Path) -> str:
  """LIBTPU_INIT_ARGS that let the compiler write schedules into a folder."""
  return (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
  )


def read(folder: pathlib.Path) -> dict[str, Schedule]:
  """Schedules of a program by the names of its operations."""
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
  parts = _parts(bundles, _windows(text))
  maybe = [False] * len(bundles)
  for part in parts:
    if part.turns is None:
      maybe[part.begin : part.end] = [True] * (part.end - part.begin)
  turns, steps, unknown = [1.0] * len(bundles), [1.0] * len(bundles), 0
  for begin, end in _loops(bundles):
    depth = bundles[begin].depth
    known = [b.turns for b in bundles[begin:end] if b.ends and b.depth == depth]
    if len(known) != 1 or not known[0]:
      unknown += 1
      continue
    share = [1.0] * (end - begin)
    for part in parts:
      # The condition's own place: the bundle after it may be empty.
      if part.turns and bundles[part.begin - 1].depth == depth:
        inside = range(max(part.begin, begin), min(part.end, end))
        for i in inside:
          share[i - begin] = min(part.turns / known[0], 1.0)
    for i in range(begin, end):
      turns[i] *= known[0] * share[i - begin]
      if not maybe[begin]:
        steps[i] *= known[0] * share[i - begin]
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
    skips=(skip[1], skip[2]) if skip else None,
    regions=tuple(_BEGIN.findall(line)),
  )


def _loops(bundles: list[_Bundle]) -> list[tuple[int, int]]:
  """First bundle of each loop, and the one after its last."""
  found: list[tuple[int, int]] = []
  open_loops: list[int] = []
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


def _parts(bundles: list[_Bundle], windows: dict[str, int]) -> list[_Part]:
  """What conditions may leave out.

  Args:
    bundles: of an operation.
    windows: of predicates, see `_windows`.
  """
  first: dict[str, int] = {}
  for i, bundle in enumerate(bundles):
    for region in bundle.regions:
      first.setdefault(region, i)
  found = []
  for i, bundle in enumerate(bundles):
    if bundle.skips is None:
      continue
    predicate, region = bundle.skips
    end = first.get(region, 0)
    if end > i + 1:
      found.append(_Part(i + 1, end, windows.get(predicate)))
  return found


def _windows(text: str) -> dict[str, int]:
  """Turns in which predicates of the form not (a <= turn < b) are false."""
  low = {name: (x, int(n)) for name, x, n in _FROM.findall(text)}
  high = {name: (x, int(n)) for name, x, n in _UNTIL.findall(text)}
  found = {}
  for name, *both in _NOT_BOTH.findall(text):
    for one, other in (both, both[::-1]):
      if one in low and other in high and low[one][0] == high[other][0]:
        found[name] = high[other][1] - low[one][1]
  return found
