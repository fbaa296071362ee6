"""RetNet (arXiv 2307.08621): matrix memories that forget at a fixed rate.

It learns at each token; a chunk is what is computed at once, and changes no
number.

Unstated in the paper: shapes, optimizer, data; ours here. What follows from
them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=retnet_tiny
    python -m experiments.lm --config=retnet_340m --describe

Measured (docs/results.md):
  tiny: 1.961 ± 0.042 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 26.08, 48.46.
  1b3: 19.08, 52.02.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("retnet", arg, learning_rate=_common.PRESET_A)
