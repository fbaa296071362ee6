"""What a compiled program does, read from its text (HLO).

The compiler's own cost analysis counts the body of a loop once, however often
it runs. Here every instruction counts as often as the loops around it turn:
products, bytes of memory, estimated cycles, and the collectives with the axes
of the mesh that they go over.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nl_jax.aot import bundles
from nl_jax.aot import text as text_lib
from nl_jax.aot import transfers as transfers_lib

Computation = text_lib.Computation
Instruction = text_lib.Instruction

# Neither read nor write memory themselves.
_FREE = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
  "call", "conditional", "after-all", "partition-id", "replica-id", "iota",
  "opt-barrier", "async-start", "async-update",
}  # fmt: skip
# Begins a copy that continues beside what follows.
_BESIDE = {"copy-start", "slice-start", "dynamic-slice-start"}
_KERNEL = "tpu_custom_call"


class Operation(NamedTuple):
  """What is launched, alone or as a fusion, and what a launch of it costs.

  Attributes:
    name: in the program.
    scope: where the model's code stands that it comes from; "" if unknown.
    kind: "kernel", "transfer" (products beside it or not), "copy" or "other".
    times: launches in a run of the program.
    cycles: the compiler's estimate; 0 where it gives none.
    schedule: of its bundles; None where the compiler wrote none.
    flops: of its products.
    hbm_bytes: read and written in main memory.
  """

  name: str
  scope: str
  kind: str
  times: int
  cycles: int
  schedule: bundles.Schedule | None
  flops: float
  hbm_bytes: float


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
    operations: what runs one after the other; not what runs beside it.
  """

  flops: float
  hbm_bytes: float
  cycles: float
  collectives: tuple[transfers_lib.Collective, ...]
  loops: tuple[int, ...]
  unknown: tuple[str, ...]
  operations: tuple[Operation, ...] = ()


def count(
  text: str,
  mesh: dict[str, int],
  schedules: Mapping[str, bundles.Schedule] | None = None,
) -> Counts:
  """Counts what a compiled program does.

  Args:
    text: of `compiled.as_text()`.
    mesh: size of each axis by name, in the order of the devices.
    schedules: of operations by name, where the compiler wrote them.
  """
  computations, entry = text_lib.parse(text)
  found: dict[Any, list] = collections.defaultdict(lambda: [0, 0.0, 0.0])
  hbm = cycles = 0.0
  loops: list[Any] = []
  unknown: list[Any] = []
  operations: list[Any] = []
  products: list[Any] = []
  of = _Schedules(computations, schedules or {})
  for step in text_lib.walk(computations, entry):
    ins, home = step.instruction, step.home
    if ins.op == "while":
      loops.append(step.trips or 1)
      if step.trips is None:
        unknown.append(f"loop {ins.name}")
    flops = _flops(ins, home)
    products.append(step.times * flops)
    transfer = transfers_lib.collective(step, mesh)
    if transfer is not None:
      key, payload, wire = transfer
      total = found[key]
      total[0] += step.times
      total[1] += step.times * payload
      total[2] += step.times * wire
    if step.fused:
      if not step.beside:
        last = operations[-1]
        kind = "transfer" if transfer and last.kind != "kernel" else last.kind
        operations[-1] = last._replace(flops=last.flops + flops, kind=kind)
      continue
    if ins.op == "custom-call" and text_lib.called(ins):
      continue  # Counted inside.
    moved = _hbm(ins, home, computations)
    hbm += step.times * moved
    if _KERNEL in ins.text and ins.op == "custom-call":
      unknown.append(f"kernel {ins.name}")
    classic = 0 if step.beside else estimated_cycles(ins)
    cycles += step.times * classic
    if step.beside or not launches(ins) or ins.op in _BESIDE:
      continue
    kind = "transfer" if transfer else _kind(ins, computations)
    operations.append(
      Operation(
        ins.name, _scope(ins), kind, step.times, classic, of(ins, home), flops,
        moved,
      )
    )  # fmt: skip
  transfers = [transfers_lib.Collective(*k, *v) for k, v in found.items()]
  transfers.sort(key=lambda c: -c.wire)
  return Counts(
    sum(products), hbm, cycles, tuple(transfers), tuple(loops), tuple(unknown),
    tuple(operations),
  )  # fmt: skip


def launches(ins: Instruction) -> bool:
  """Whether an instruction is work of its own, or begins some."""
  return ins.op not in _FREE and not ins.op.endswith("-done")


def _scope(ins: Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', ins.text)
  return found[1] if found else ""


# What changes the layout of arrays and computes nothing.
_LAYS = {
  "copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice",
  "dynamic-update-slice", "concatenate", "pad", "parameter", "constant",
  "tuple", "broadcast", "get-tuple-element",
}  # fmt: skip


def _kind(ins: Instruction, computations: dict[str, Computation]) -> str:
  if ins.op == "custom-call" and _KERNEL in ins.text:
    return "kernel"
  if ins.op.startswith(("copy", "transpose")):
    return "copy"
  if ins.op == "fusion":
    (inner,) = text_lib.attribute(ins, "calls")
    made = {x.op for x in computations[inner].body.values()}
    if made <= _LAYS and made & {"copy", "transpose", "concatenate"}:
      return "copy"
  return "other"


# What differs between operations that are the same.
_OWN = r"channel_id=\d+|(metadata|backend_config|frontend_attributes)=.*"


class _Schedules:
  """Schedules of operations; of equal ones the compiler writes one."""

  def __init__(
    self,
    computations: dict[str, Computation],
    schedules: Mapping[str, bundles.Schedule],
  ):
    self._computations, self._by_name = computations, schedules
    self._by_form = {
      self._form(ins, home): schedules[ins.name]
      for home in computations.values() if schedules
      for ins in home.body.values() if ins.name in schedules
    }  # fmt: skip

  def __call__(
    self, ins: Instruction, home: Computation
  ) -> bundles.Schedule | None:
    if ins.name in self._by_name or not self._by_name:
      return self._by_name.get(ins.name)
    return self._by_form.get(self._form(ins, home))

  def _form(self, ins: Instruction, home: Computation) -> str:
    """What an instruction does, without names."""
    shapes = [home.body[x].shape for x in ins.operands]
    attributes = re.sub(r"^\([^)]*\)|%[\w.-]+|" + _OWN, "", ins.text)
    inside = [
      self._body(self._computations[name])
      for name in text_lib.attribute(ins, "calls")
    ]
    return f"{ins.op} {ins.shape} {shapes} {attributes} {inside}"

  def _body(self, inner: Computation) -> str:
    places = {name: str(i) for i, name in enumerate(inner.body)}
    lines = []
    for ins in inner.body.values():
      text = re.sub(_OWN, "", ins.text)
      for name in text_lib.attribute(ins, "calls"):
        text += self._body(self._computations[name])
      known = lambda match: places.get(match[1], "")
      text = re.sub(r"%([\w.-]+)", known, text)
      lines.append(f"{ins.op} {ins.shape} {text}")
    return "\n".join(lines)


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
  computations, entry = text_lib.parse(text)
  found: list[Any] = []
  for step in text_lib.walk(computations, entry):
    ins = step.instruction
    if step.depth == 0 and ins.op == "while":
      found.append([])
    if step.depth and launches(ins) and not step.fused:
      found[-1].append((ins, step.times))
  return found


def _flops(ins: Instruction, home: Computation) -> float:
  """Of a product: 2 x outputs x terms of each sum."""
  if ins.op == "dot":
    lhs = home.body[ins.operands[0]].arrays[0].dims
    axes = text_lib.found(r"lhs_contracting_dims=\{([\d,]*)\}", ins.text)[1]
    terms = math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * math.prod(ins.arrays[0].dims) * terms
  return _convolution(ins, home) if ins.op == "convolution" else 0.0


def _convolution(ins: Instruction, home: Computation) -> float:
  """Products of a convolution that do not fall on padding or between inputs.

  A TPU's batched product is a dilated convolution, most of it such holes.
  """
  labels = text_lib.found(r"dim_labels=(\w+)_(\w+)->(\w+)", ins.text)
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


def _hbm(
  ins: Instruction, home: Computation, computations: dict[str, Computation]
) -> float:
  """Bytes of main memory that an instruction reads and writes."""
  if ins.op in _FREE or ins.op.endswith("-done"):
    return 0.0
  if ins.op == "fusion":
    return _fusion(ins, home, computations)
  if ins.op in ("slice", "dynamic-slice"):
    whole = home.body[ins.operands[0]].arrays[0]
    return ins.bytes * (not whole.on_chip) + _outside(ins.arrays)
  if ins.op == "dynamic-update-slice":
    return 2 * _outside(home.body[ins.operands[1]].arrays)
  # The tuple of a beginning copy has its result first, then its operand.
  written = ins.arrays[:1] if ins.op.endswith("-start") else ins.arrays
  read = sum(_outside(home.body[x].arrays) for x in ins.operands)
  return _outside(written) + read


def _fusion(
  ins: Instruction, home: Computation, computations: dict[str, Computation]
) -> float:
  """Bytes through the border of a fusion: of a slice only the slice."""
  inner = _inner(ins, computations)
  read = _reads(inner, computations)
  total = sum(
    min(_outside(home.body[name].arrays), read[at])
    for at, name in enumerate(ins.operands)
  )
  root = next(x for x in inner.body.values() if x.root)
  results = [root.name] if root.op != "tuple" else root.operands
  for name, array in zip(results, ins.arrays):
    made = inner.body[name]
    if made.op == "dynamic-update-slice" and not array.on_chip:
      total += inner.body[made.operands[1]].bytes
    elif made.op not in ("parameter", "custom-call"):
      total += _outside([array])
  return total


def _inner(
  ins: Instruction, computations: dict[str, Computation]
) -> Computation:
  (name,) = text_lib.attribute(ins, "calls")
  return computations[name]


def _reads(
  inner: Computation, computations: dict[str, Computation]
) -> dict[int, float]:
  """Bytes of each parameter that a fused computation reads."""
  users = collections.defaultdict(list)
  for x in inner.body.values():
    for name in x.operands:
      users[name].append(x)
  return {
    int(text_lib.found(r"\((\d+)\)", x.text)[1]): min(
      x.bytes, sum(_read(x, user, computations) for user in users[x.name])
    )
    for x in inner.body.values() if x.op == "parameter"
  }  # fmt: skip


def _read(
  parameter: Instruction,
  user: Instruction,
  computations: dict[str, Computation],
) -> float:
  """Bytes of a fusion's parameter that one of its users reads."""
  if user.op in ("dynamic-slice", "gather"):
    return user.bytes
  if user.op == "dynamic-update-slice" and user.operands[0] == parameter.name:
    return 0.0  # Written in place.
  if user.op in ("tuple", "custom-call", "get-tuple-element"):
    return 0.0
  if user.op == "fusion":
    read = _reads(_inner(user, computations), computations)
    return sum(
      read[at]
      for at, name in enumerate(user.operands) if name == parameter.name
    )  # fmt: skip
  return parameter.bytes


def _outside(arrays: Sequence[text_lib.Array]) -> float:
  return sum(array.bytes for array in arrays if not array.on_chip)
