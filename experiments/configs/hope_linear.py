"""HOPE with matrix memories, the cheap form; ours.

As `hope`, but each memory is one matrix, with the delta rule.

Unstated in the paper: matrix memories, shapes, chunk lengths, optimizer, data;
ours here. What follows from them (parameters, FLOPs, levels, tokens) is printed
by --describe:

    python -m experiments.lm --config=hope_linear_tiny
    python -m experiments.lm --config=hope_linear_340m --describe

Measured (docs/results.md):
  tiny: 1.519 ± 0.011 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("hope_linear", arg)
