"""DeltaNet (arXiv 2406.06484): a matrix memory with the delta rule.

It learns at each token; a chunk is what is computed at once, and changes no
number.

Unstated in the paper: shapes, optimizer, data; ours here. What follows from
them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=deltanet_tiny
    python -m experiments.lm --config=deltanet_340m --describe

Measured (docs/results.md):
  tiny: 1.889 ± 0.045 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 24.37, 48.97.
  1b3: 17.71, 52.14.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("deltanet", arg, learning_rate=_common.PRESET_A)
