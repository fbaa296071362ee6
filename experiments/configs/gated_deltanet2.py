"""Gated DeltaNet-2 (arXiv 2605.22791): gates of a channel for erase and write.

Heads of Gated DeltaNet. It learns at each token; a chunk is what is computed at
once, and changes no number. It is not a row of Table 1.

Unstated in the paper: shapes, ranks of the projections; ours here. What follows
from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=gated_deltanet2_tiny
    python -m experiments.lm --config=gated_deltanet2_340m --describe

Measured (docs/results.md):
  tiny: not run.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family(
    "gated_deltanet2", arg, learning_rate=_common.PRESET_A
  )
