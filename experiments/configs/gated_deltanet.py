"""Gated DeltaNet (arXiv 2412.06464): the delta rule with retention.

It learns at each token; a chunk is what is computed at once, and changes no
number. It is not a row of Table 1.

Unstated in the paper: shapes; ours here. What follows from them (parameters,
FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=gated_deltanet_tiny
    python -m experiments.lm --config=gated_deltanet_340m --describe

Measured (docs/results.md):
  tiny: 1.548 ± 0.014 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family(
    "gated_deltanet", arg, learning_rate=_common.PRESET_A
  )
