"""Transfers between chips in a compiled program, and the axes they go over."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nl_jax.aot import text as text_lib

_COLLECTIVE = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
  r"(-start)?$"
)
_ASYNC = "AsyncCollectiveStart"  # Of a gather that runs beside products.


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
  count: int  # type: ignore[assignment]  # Of tuples a method.
  payload: float
  wire: float


def collective(
  step: text_lib.Step, mesh: dict[str, int]
) -> tuple[tuple[str, str, str, bool], float, float] | None:
  """((kind, axes, place, hidden), payload, wire) of a transfer, or None.

  Args:
    step: an instruction as it is met.
    mesh: size of each axis by name, in the order of the devices.
  """
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


def _phase(ins: text_lib.Instruction) -> str:
  name = re.search(r'op_name="([^"]*)"', ins.text)
  if name is None:
    return "unnamed"
  if "transpose(" in name[1]:
    return "backward"
  return "forward" if "jvp(" in name[1] or "while/" in name[1] else "rest"


def _group(ins: text_lib.Instruction, mesh: dict[str, int]) -> tuple[str, int]:
  """The axes that a transfer goes over, and the devices of a group."""
  ids = _first_group(ins.text, math.prod(mesh.values()))
  if len(ids) < 2:
    return "", len(ids)
  places = np.unravel_index(np.asarray(ids), tuple(mesh.values()))
  axes = [a for a, at in zip(mesh, places) if len(set(at.tolist())) > 1]
  return ",".join(axes), len(ids)


def _first_group(text: str, devices: int) -> Sequence[int] | np.ndarray:
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
