"""Titans, MAG (arXiv 2501.00663): memory as gate.

Sliding-window attention and the memory read side by side, and a gate mixes
them.

Unstated in the paper: shapes, chunk lengths, windows, optimizer, data; ours
here. What follows from them (parameters, FLOPs, levels, tokens) is printed by
--describe:

    python -m experiments.lm --config=titans_mag_tiny
    python -m experiments.lm --config=titans_mag_340m --describe

Measured (docs/results.md):
  tiny: 1.584 ± 0.014 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("titans_mag", arg)
