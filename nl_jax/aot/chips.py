"""The chips of a TPU slice, as their maker states them, and a simple roofline.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System
architecture". The rate of a link is the chip's bandwidth between chips, one
way, over its 4 (2D torus) or 6 (3D torus) ports. Clocks are the peak over the
products of the matrix units of a cycle, those of a v6e taken as four of 256 x
256; where that gives no plausible clock there is none here, and cycles stay
cycles.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from nl_jax.aot import hlo


class Chip(NamedTuple):
  """A kind of chip.

  Attributes:
    flops: dense bfloat16 operations per second.
    hbm_bytes: main memory.
    hbm_rate: its bytes per second.
    link_rate: bytes per second of one port, one way.
    sides: of a slice: 2 or 3.
    clock: of the compiler's cycles, Hz; 0: not known.
    slice: the one that --all compiles for.
  """

  flops: float
  hbm_bytes: float
  hbm_rate: float
  link_rate: float
  sides: int
  clock: float
  slice: str


_GIB = 2**30
CHIPS = {
  "v4": Chip(275e12, 32 * _GIB, 1200e9, 50e9, 3, 0, "4x4x4"),
  "v5e": Chip(197e12, 16 * _GIB, 819e9, 50e9, 2, 1.503e9, "16x16"),
  "v5p": Chip(459e12, 95 * _GIB, 2765e9, 100e9, 3, 1.75e9, "4x4x4"),
  "v6e": Chip(918e12, 32 * _GIB, 1600e9, 100e9, 2, 1.75e9, "16x16"),
  "tpu7x": Chip(2307e12, 192 * _GIB, 7380e9, 100e9, 3, 0, "4x4x4"),
}


class Roofline(NamedTuple):
  """Least seconds of a program; estimates, of a chip that was not there.

  Attributes:
    products: matrix products at the peak.
    memory: all reads and writes of main memory, one after the other.
    links: all transfers, along one axis of the torus, both ways at once.
    cycles: the compiler's own estimate of everything but transfers; None
      where the clock is not known.
  """

  products: float
  memory: float
  links: float
  cycles: float | None

  @property
  def least(self) -> float:
    """If everything overlaps."""
    return max(self.products, self.memory, self.links)

  @property
  def most(self) -> float:
    """If nothing does."""
    return self.products + self.memory + self.links


def kind(topology: str) -> str:
  """The chip of a topology as "v5e:16x16".

  Raises:
    ValueError: an unknown chip, or a slice of another shape.
  """
  name, _, sides = topology.partition(":")
  if name not in CHIPS:
    hint = " (v7x is written tpu7x)" if name == "v7x" else ""
    raise ValueError(
      f"--topology={topology}: unknown chip {name!r}{hint}; known: "
      f"{', '.join(CHIPS)}"
    )
  chip = CHIPS[name]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sides) or (
    sides.count("x") + 1 != chip.sides
  ):
    raise ValueError(
      f"--topology={topology}: a slice of {name} has {chip.sides} sides; "
      f"write {name}:{chip.slice}, say"
    )
  return name


def roofline(counts: hlo.Counts, chip: Chip, per_chip: int) -> Roofline:
  """The least time of a program, from what it does on each device.

  Args:
    counts: of one device.
    chip: its chip.
    per_chip: devices of a chip, which share its rates.
  """
  wire = sum(transfer.wire for transfer in counts.collectives)
  return Roofline(
    products=counts.flops * per_chip / chip.flops,
    memory=counts.hbm_bytes * per_chip / chip.hbm_rate,
    links=wire * per_chip / (2 * chip.link_rate),
    cycles=counts.cycles / chip.clock if chip.clock else None,
  )


def advice(
  memory: dict[str, float], accumulate: int, remat: str, knobs: Sequence[str]
) -> str:
  """Which knob to turn where a program does not fit.

  Args:
    memory: bytes of a device, by name.
    accumulate: micro-batches of a step.
    remat: what the backward pass recomputes.
    knobs: fields of `model.mixer` that this model has.
  """
  held = memory["parameters"] + memory["optimizer"]
  # The compiler tells no temporaries of what it refuses.
  if held > memory.get("temporaries", float("inf")):
    return "raise mesh.fsdp or take more chips: weights and optimizer are most"
  turn = []
  if remat == "none":
    turn.append("--config.train.remat=layer")
  turn.append(f"--config.train.accumulate={2 * accumulate}")
  if "remat_group" in knobs:
    turn.append("a remat_group nearer to the root of the number of chunks")
  turn += [f"a larger {knob}" for knob in knobs if knob.startswith("chunk")]
  return "temporaries are most: " + ", or ".join(turn + ["a larger mesh.fsdp"])
