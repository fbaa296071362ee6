"""The time of a program by its parts, from the schedules of its operations.

A kernel takes its bundles, steps of its grid counted. An operation takes its
bundles and 180 cycles more (kernels seen on chips took those to begin), or, if
longer, its products at the peak or its bytes at the rate of main memory. What
goes over links and is not hidden comes on top. No stalls are in it.
"""

import re
from typing import NamedTuple

from nl_jax.aot import chips, hlo
from nl_jax.kernels import splash_attention

LAUNCH = 180  # Cycles of an operation beside its bundles.
# (part, pattern of the scope, whether it has products; None: either).
_PARTS = (
  ("optimizer", r"/optimizer\b", None),
  ("output and loss", r"\b(output|loss)\b", None),
  ("CMS", r"/CMS/", None),
  ("convolutions", r"/conv\b", None),
  ("projections", r"/mixer/", True),
  ("mixer, the rest", r"/mixer/", False),
)
_REST = "rest"


class Estimate(NamedTuple):
  """Seconds of a run of a program; an estimate, of a chip that was not there.

  Attributes:
    kernels: of walks and attention.
    operations: all others.
    links: transfers that are not hidden.
    parts: the same by part of the model, largest first.
    launches: of operations and kernels.
    unknown: of these, without a schedule.
  """

  kernels: float
  operations: float
  links: float
  parts: dict[str, float]
  launches: int
  unknown: int

  @property
  def seconds(self) -> float:
    """One thing after the other."""
    return self.kernels + self.operations + self.links


def estimate(
  counts: hlo.Counts,
  chip: chips.Chip,
  per_chip: int,
  tokens: int,
  window: int = 0,
) -> Estimate | None:
  """The time of a program, or None where the chip's clock is not known.

  Args:
    counts: of one device, with schedules.
    chip: its chip.
    per_chip: devices of a chip, which share its rates.
    tokens: of a row, of which attention leaves out half.
    window: of attention, or 0.
  """
  if not chip.clock:
    return None
  share = splash_attention.share(tokens, window)
  parts: dict[str, float] = {}
  totals = dict.fromkeys(("kernel", "other"), 0.0)
  launches = unknown = 0
  for op in counts.operations:
    launches += op.times
    if op.kind == "transfer" and not op.flops:
      continue  # Counted by its bytes, below.
    unknown += op.times * (op.schedule is None)
    least = max(
      op.flops * per_chip / chip.flops, op.hbm_bytes * per_chip / chip.hbm_rate
    )
    seconds = op.times * max(_cycles(op, share) / chip.clock, least)
    totals["kernel" if op.kind == "kernel" else "other"] += seconds
    name = part(op)
    parts[name] = parts.get(name, 0.0) + seconds
  wire = sum(c.wire for c in counts.collectives if not c.hidden)
  links = wire * per_chip / (2 * chip.link_rate)
  if links:
    parts["transfers"] = links
  parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
  return Estimate(
    totals["kernel"], totals["other"], links, parts, launches, unknown
  )


def _cycles(op: hlo.Operation, share: float) -> float:
  if op.schedule is None:
    return LAUNCH
  if op.kind != "kernel":
    return op.schedule.bundles + LAUNCH
  kept = share if op.name.startswith("splash") else 1.0
  return op.schedule.always + kept * op.schedule.maybe + LAUNCH


def part(op: hlo.Operation) -> str:
  """The part of a model that an operation belongs to."""
  if op.kind == "kernel":
    return "attention" if op.name.startswith("splash") else "walks"
  if op.kind == "copy":
    return "copies"
  for name, pattern, products in _PARTS:
    if re.search(pattern, op.scope) and products in (None, op.flops > 0):
      return name
  return _REST
