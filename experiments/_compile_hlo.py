"""What a compiled program does, read from its text (HLO).

The compiler's own cost analysis counts the body of a loop once, however often
it runs. Here every instruction counts as often as the loops around it turn:
products, bytes of memory, estimated cycles, and the collectives with the axes
of the mesh that they go over.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_BYTES = {
  "token": 0, "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2,
  "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
  "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_COLLECTIVE = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
  r"(-start)?$"
)
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)$")
# Neither read nor write memory themselves.
_FREE = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
  "call", "conditional", "after-all", "partition-id", "replica-id", "iota",
  "opt-barrier", "async-start", "async-update",
}  # fmt: skip
_ASYNC = "AsyncCollectiveStart"  # Of a gather that runs beside products.


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
  """

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str
  root: bool

  @property
  def bytes(self) -> float:
    """Of all its arrays."""
    return sum(array.bytes for array in self.arrays)


class Computation(NamedTuple):
  """A function of the program: its name, and instructions by name in order."""

  name: str
  body: dict[str, Instruction]


class Collective(NamedTuple):
  """Transfers of one kind, place and set of axes, in one run of the program.

  Attributes:
    kind: as "all-gather".
    axes: of the mesh, joined by commas.
    place: "forward", "backward" or "rest", and in how many nested loops.
    hidden: the compiler runs it beside other work.
    count: how often, loops counted by their trips.
    payload: bytes of the whole arrays, on each device.
    wire: bytes that each device sends, in rings.
  """

  kind: str
  axes: str
  place: str
  hidden: bool
  count: int
  payload: float
  wire: float


class Counts(NamedTuple):
  """What one run of the program costs a device.

  Attributes:
    flops: of matrix products and convolutions, multiply-add as 2.
    hbm_bytes: read and written in main memory by all instructions.
    cycles: sum of the compiler's estimates; 0 where it gives none.
    collectives: of all kinds.
    loops: trips of each loop, in order.
    unknown: loops whose trips are not in the text, counted once, and custom
      calls without an estimate.
  """

  flops: float
  hbm_bytes: float
  cycles: float
  collectives: tuple[Collective, ...]
  loops: tuple[int, ...]
  unknown: tuple[str, ...]


def count(text: str, mesh: dict[str, int]) -> Counts:
  """Counts what a compiled program does.

  Args:
    text: of `compiled.as_text()`.
    mesh: size of each axis by name, in the order of the devices.
  """
  computations, entry = parse(text)
  found = collections.defaultdict(lambda: [0, 0.0, 0.0])
  flops = hbm = cycles = 0.0
  loops, unknown = [], []
  for step in _walk(computations, entry, 1, 0):
    ins, home = step.instruction, step.home
    if ins.op == "while":
      loops.append(step.trips or 1)
      if step.trips is None:
        unknown.append(f"loop {ins.name}")
    flops += step.times * _flops(ins, home)
    if (transfer := _collective(step, mesh)) is not None:
      key, payload, wire = transfer
      total = found[key]
      total[0] += step.times
      total[1] += step.times * payload
      total[2] += step.times * wire
    if step.fused:
      continue
    if ins.op == "custom-call" and _called(ins):
      continue  # Counted inside.
    hbm += step.times * _hbm(ins, home, computations)
    if not step.beside:
      cycles += step.times * estimated_cycles(ins)
    if ins.op == "custom-call" and "tpu_custom_call" in ins.text:
      unknown.append(f"kernel {ins.name}")
  transfers = [Collective(*key, *total) for key, total in found.items()]
  transfers.sort(key=lambda c: -c.wire)
  return Counts(
    flops, hbm, cycles, tuple(transfers), tuple(loops), tuple(unknown)
  )


def estimated_cycles(ins: Instruction) -> int:
  """The compiler's estimate of an instruction; 0 where it gives none."""
  found = re.search(r'"estimated_cycles":"(\d+)"', ins.text)
  return int(found[1]) if found else 0


def loops(text: str) -> list[list[tuple[Instruction, int]]]:
  """What each loop of a program launches, those within it too, and how often.

  Args:
    text: as `count`.

  Returns:
    The outermost loops, in order.
  """
  computations, entry = parse(text)
  found = []
  for step in _walk(computations, entry, 1, 0):
    ins = step.instruction
    if step.depth == 0 and ins.op == "while":
      found.append([])
    launched = ins.op not in _FREE and not ins.op.endswith("-done")
    if step.depth and launched and not step.fused:
      found[-1].append((ins, step.times))
  return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the name of the entry.

  Raises:
    ValueError: there is no entry in the text.
  """
  computations, entry, current, last = {}, "", None, None
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
    else:  # The attributes of a kernel may go over several lines.
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


class _Step(NamedTuple):
  """An instruction as it is met: how often, where, and beside what follows."""

  instruction: Instruction
  home: Computation
  times: int
  fused: bool
  depth: int
  trips: int | None
  beside: bool


def _walk(
  computations: dict[str, Computation],
  name: str,
  times: int,
  depth: int,
  fused: bool = False,
  beside: bool = False,
) -> Iterator[_Step]:
  """Every instruction that runs; all branches of a choice count."""
  home = computations[name]
  for ins in home.body.values():
    trips = None
    if ins.op == "while":
      trips = _trips(ins, home, computations)
    yield _Step(ins, home, times, fused, depth, trips, beside)
    for called in _called(ins):
      yield from _walk(
        computations, called, times * (trips or 1),
        depth + (ins.op == "while"), fused or ins.op == "fusion",
        beside or ins.op == "async-start",
      )  # fmt: skip


def _called(ins: Instruction) -> list[str]:
  """Computations that an instruction runs, those of reductions aside."""
  if ins.op == "while":
    return _attribute(ins, "body")
  if ins.op == "conditional":
    listed = re.search(r"branch_computations=\{([^}]*)\}", ins.text)
    if listed:
      return _NAME.findall(listed[1])
    return [
      *_attribute(ins, "true_computation"),
      *_attribute(ins, "false_computation"),
    ]
  if ins.op in ("fusion", "async-start"):
    return _attribute(ins, "calls")
  if ins.op == "custom-call":  # What a sparse core does is inside of one.
    listed = re.search(r"called_computations=\{([^}]*)\}", ins.text)
    return _NAME.findall(listed[1]) if listed else []
  return _attribute(ins, "to_apply") if ins.op == "call" else []


def _attribute(ins: Instruction, key: str) -> list[str]:
  return re.findall(rf"\b{key}=%([\w.-]+)", ins.text)


def _trips(
  ins: Instruction, home: Computation, computations: dict[str, Computation]
) -> int | None:
  """How often a loop turns; None where the text does not tell."""
  known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', ins.text)
  if known:
    return int(known[1])
  condition = computations[_attribute(ins, "condition")[0]].body
  ends = [
    x
    for x in condition.values()
    if x.op == "constant" and re.match(r"\(\d+\)", x.text)
  ]
  if len(ends) != 1:
    return None
  end = int(re.match(r"\((\d+)\)", ends[0].text)[1])
  index = [x for x in condition.values() if x.op == "get-tuple-element"]
  begin = 0
  if len(index) == 1 and ins.operands[0] in home.body:
    at = int(re.search(r"index=(\d+)", index[0].text)[1])
    carried = home.body[ins.operands[0]].operands
    first = home.body.get(carried[at]) if at < len(carried) else None
    if first is not None and first.op == "constant":
      begin = int(re.match(r"\((-?\d+)\)", first.text)[1])
  return max(end - begin, 0)


def _flops(ins: Instruction, home: Computation) -> float:
  """Of a product: 2 x outputs x terms of each sum."""
  if ins.op == "dot":
    lhs = home.body[ins.operands[0]].arrays[0].dims
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", ins.text)[1]
    terms = math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * math.prod(ins.arrays[0].dims) * terms
  return _convolution(ins, home) if ins.op == "convolution" else 0.0


def _convolution(ins: Instruction, home: Computation) -> float:
  """Products of a convolution that do not fall on padding or between inputs.

  A TPU's batched product is a dilated convolution, most of it such holes.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", ins.text)
  lhs, rhs = (home.body[name].arrays[0].dims for name in ins.operands[:2])
  inputs, kernel, out = (
    dict(zip(label, dims))
    for label, dims in zip(labels.groups(), (lhs, rhs, ins.arrays[0].dims))
  )
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", _window(ins)))
  spatial = sum(key.isdigit() for key in out)
  field = lambda key, empty: window.get(key) or "x".join([empty] * spatial)
  sizes = [field(k, e).split("x") for k, e in
           (("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"),
            ("pad", "0_0"))]  # fmt: skip
  pairs = 1
  for d in range(spatial):
    stride, spread, hole = (int(values[d]) for values in sizes[:3])
    low = int(sizes[3][d].split("_")[0])
    at = np.arange(out[str(d)])[:, None] * stride - low
    at = at + np.arange(kernel[str(d)]) * hole
    inside = (at >= 0) & (at <= (inputs[str(d)] - 1) * spread)
    pairs *= int(np.sum(inside & (at % spread == 0)))
  return 2.0 * out["b"] * out["f"] * kernel["i"] * pairs


def _window(ins: Instruction) -> str:
  found = re.search(r"window=\{([^}]*)\}", ins.text)
  return found[1] if found else ""


def _collective(
  step: _Step, mesh: dict[str, int]
) -> tuple[tuple[str, str, str, bool], float, float] | None:
  """((kind, axes, place, hidden), payload, wire) of a transfer, or None."""
  ins, home = step.instruction, step.home
  match = _COLLECTIVE.match(ins.op)
  if not match:
    return None
  begun = any(_ASYNC in x.text for x in home.body.values())
  if "chain_id=" in ins.text and not begun:
    return None  # A later piece of one that is counted where it begins.
  axes, size = _group(ins, mesh)
  if size == 1:
    return None
  kind = match[1]
  if kind == "all-reduce" and home.name.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # A TPU's: the sum, of which a shard is kept.
  given = sum(home.body[name].bytes for name in ins.operands)
  payload = given * size if kind == "all-gather" else given
  share = 1 if kind == "collective-permute" else (size - 1) / size
  wire = payload * share * (2 if kind == "all-reduce" else 1)
  hidden = bool(match[2]) or begun or step.beside
  place = _phase(ins) + _inside(step.depth)
  return (kind, axes, place, hidden), payload, wire


def _inside(loops: int) -> str:
  if loops < 2:
    return ", in a loop" if loops else ""
  return f", in {loops} nested loops"


def _phase(ins: Instruction) -> str:
  name = re.search(r'op_name="([^"]*)"', ins.text)
  if name is None:
    return "unnamed"
  if "transpose(" in name[1]:
    return "backward"
  return "forward" if "jvp(" in name[1] or "while/" in name[1] else "rest"


def _group(ins: Instruction, mesh: dict[str, int]) -> tuple[str, int]:
  """The axes that a transfer goes over, and the devices of a group."""
  ids = _first_group(ins.text, math.prod(mesh.values()))
  if len(ids) < 2:
    return "", len(ids)
  places = np.unravel_index(np.asarray(ids), tuple(mesh.values()))
  axes = [a for a, at in zip(mesh, places) if len(set(at.tolist())) > 1]
  return ",".join(axes), len(ids)


def _first_group(text: str, devices: int) -> Sequence[int]:
  """Ids of the devices of the first group."""
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    over = re.findall(r"'(\w+)'", named[2])
    table = np.arange(devices).reshape([int(n) for n in sizes.values()])
    return table[
      tuple(slice(None) if axis in over else 0 for axis in sizes)
    ].reshape(-1)
  dealt = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  )
  if dealt:
    numbers = lambda s: [int(n) for n in s.split(",")]
    table = np.arange(devices).reshape(numbers(dealt[2]))
    table = table.transpose(numbers(dealt[3])) if dealt[3] else table
    return table.reshape(numbers(dealt[1]))[0]
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}",
                     text)  # fmt: skip
  if listed:
    return [int(n) for n in listed[1].split(",")]
  return range(devices)


def _hbm(
  ins: Instruction, home: Computation, computations: dict[str, Computation]
) -> float:
  """Bytes of main memory that an instruction reads and writes."""
  if ins.op in _FREE or ins.op.endswith("-done"):
    return 0.0
  if ins.op == "fusion":
    return _fusion(ins, home, computations[_attribute(ins, "calls")[0]])
  if ins.op in ("slice", "dynamic-slice"):
    read = home.body[ins.operands[0]].arrays[0]
    return ins.bytes * (not read.on_chip) + _outside(ins.arrays)
  if ins.op == "dynamic-update-slice":
    return 2 * _outside(home.body[ins.operands[1]].arrays)
  # The tuple of a beginning copy has its result first, then its operand.
  written = ins.arrays[:1] if ins.op.endswith("-start") else ins.arrays
  read = sum(_outside(home.body[x].arrays) for x in ins.operands)
  return _outside(written) + read


def _fusion(ins: Instruction, home: Computation, inner: Computation) -> float:
  """Bytes through the border of a fusion: of a slice only the slice."""
  users = collections.defaultdict(list)
  for x in inner.body.values():
    for name in x.operands:
      users[name].append(x)
  total = 0.0
  for x in inner.body.values():
    if x.op != "parameter":
      continue
    at = int(re.match(r"\((\d+)\)", x.text)[1])
    outside = _outside(home.body[ins.operands[at]].arrays)
    total += min(outside, sum(_read(x, user) for user in users[x.name]))
  root = next(x for x in inner.body.values() if x.root)
  results = [root.name] if root.op != "tuple" else root.operands
  for name, array in zip(results, ins.arrays):
    made = inner.body[name]
    if made.op == "dynamic-update-slice" and not array.on_chip:
      total += inner.body[made.operands[1]].bytes
    elif made.op not in ("parameter", "custom-call"):
      total += _outside([array])
  return total


def _read(parameter: Instruction, user: Instruction) -> float:
  """Bytes of a fusion's parameter that one of its users reads."""
  if user.op in ("dynamic-slice", "gather"):
    return user.bytes
  if user.op == "dynamic-update-slice" and user.operands[0] == parameter.name:
    return 0.0  # Written in place.
  if user.op in ("tuple", "custom-call", "get-tuple-element"):
    return 0.0
  return parameter.bytes


def _outside(arrays: Sequence[Array]) -> float:
  return sum(array.bytes for array in arrays if not array.on_chip)
