"""The text of a compiled program (HLO): its computations and what runs.

An instruction runs as often as the loops around it turn, which the text tells.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
  "token": 0, "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2,
  "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
  "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)$")


class Array(NamedTuple):
  """One array of an instruction's shape.

  Attributes:
    dims: its axes.
    bytes: without padding of tiles.
    on_chip: it lives in VMEM, not in the chip's main memory.
  """

  dims: tuple[int, ...]
  bytes: float
  on_chip: bool


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: without the percent sign.
    op: as "fusion", "dot".
    arrays: of its shape; several of a tuple.
    operands: names.
    text: of the operands and of all that follows.
    root: it is what the computation returns.
    shape: as it is written, layouts and all.
  """

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str
  root: bool
  shape: str = ""

  @property
  def bytes(self) -> float:
    """Of all its arrays."""
    return sum(array.bytes for array in self.arrays)


class Computation(NamedTuple):
  """A function of the program: its name, and instructions by name in order."""

  name: str
  body: dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the name of the entry.

  Raises:
    ValueError: there is no entry in the text.
  """
  computations: dict[str, Computation] = {}
  entry, current, last = "", None, None
  for line in text.splitlines():
    if current is None:
      head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
      if head:
        current = Computation(head[2], {})
        computations[head[2]] = current
        entry = head[2] if head[1] else entry
    elif line == "}" or line.startswith("}, "):
      current = None
    elif match := _LINE.match(line):
      last = _instruction(*match.groups())
      current.body[last.name] = last
    elif last is not None:  # A kernel's attributes may go over several lines.
      last = last._replace(text=last.text + line)
      current.body[last.name] = last
  if not entry:
    raise ValueError("expected the text of a compiled program, got no ENTRY")
  return computations, entry


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  return Instruction(
    name=name,
    op=rest[:opening],
    arrays=tuple(_array(*match) for match in _SHAPE.findall(shape)),
    operands=tuple(_NAME.findall(rest[opening : closing + 1])),
    text=rest[opening:],
    root=bool(root),
    shape=shape,
  )


def _closing(text: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  return len(text) - 1


def _array(dtype: str, dims: str, layout: str) -> Array:
  sizes = tuple(int(n) for n in dims.split(",") if n)
  # All f8 and f4 types, whatever their exponents.
  width = _BYTES.get(dtype, 0.5 if dtype.startswith("f4") else 1)
  return Array(sizes, math.prod(sizes) * width, "S(1)" in layout)


class Step(NamedTuple):
  """An instruction as it is met: how often, where, and beside what follows."""

  instruction: Instruction
  home: Computation
  times: int
  fused: bool
  depth: int
  trips: int | None
  beside: bool


def walk(
  computations: dict[str, Computation],
  name: str,
  times: int = 1,
  depth: int = 0,
  fused: bool = False,
  beside: bool = False,
) -> Iterator[Step]:
  """Every instruction that runs; all branches of a choice count."""
  home = computations[name]
  for ins in home.body.values():
    trips = None
    if ins.op == "while":
      trips = _trips(ins, home, computations)
    yield Step(ins, home, times, fused, depth, trips, beside)
    for name in called(ins):
      yield from walk(
        computations, name, times * (trips or 1),
        depth + (ins.op == "while"), fused or ins.op == "fusion",
        beside or ins.op == "async-start",
      )  # fmt: skip


def called(ins: Instruction) -> list[str]:
  """Computations that an instruction runs, those of reductions aside."""
  if ins.op == "while":
    return attribute(ins, "body")
  if ins.op == "conditional":
    listed = re.search(r"branch_computations=\{([^}]*)\}", ins.text)
    if listed:
      return _NAME.findall(listed[1])
    return [
      *attribute(ins, "true_computation"),
      *attribute(ins, "false_computation"),
    ]
  if ins.op in ("fusion", "async-start"):
    return attribute(ins, "calls")
  if ins.op == "custom-call":  # What a sparse core does is inside of one.
    listed = re.search(r"called_computations=\{([^}]*)\}", ins.text)
    return _NAME.findall(listed[1]) if listed else []
  return attribute(ins, "to_apply") if ins.op == "call" else []


def attribute(ins: Instruction, key: str) -> list[str]:
  """Names of the computations that are an attribute of an instruction."""
  return re.findall(rf"\b{key}=%([\w.-]+)", ins.text)


def _trips(
  ins: Instruction, home: Computation, computations: dict[str, Computation]
) -> int | None:
  """How often a loop turns; None where the text does not tell."""
  known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', ins.text)
  if known:
    return int(known[1])
  condition = computations[attribute(ins, "condition")[0]].body
  ends = [
    x
    for x in condition.values()
    if x.op == "constant" and re.match(r"\(\d+\)", x.text)
  ]
  if len(ends) != 1:
    return None
  end = int(found(r"\((\d+)\)", ends[0].text)[1])
  index = [x for x in condition.values() if x.op == "get-tuple-element"]
  begin = 0
  if len(index) == 1 and ins.operands[0] in home.body:
    at = int(found(r"index=(\d+)", index[0].text)[1])
    carried = home.body[ins.operands[0]].operands
    first = home.body.get(carried[at]) if at < len(carried) else None
    if first is not None and first.op == "constant":
      begin = int(found(r"\((-?\d+)\)", first.text)[1])
  return max(end - begin, 0)


def found(pattern: str, text: str) -> re.Match[str]:
  """The first match of what a compiler always writes.

  Raises:
    ValueError: it is not there.
  """
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"expected {pattern} in the compiler's text {text!r}")
  return match
