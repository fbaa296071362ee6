"""Samba (arXiv 2406.07522): Mamba and sliding-window attention in turn.

Each has a feed-forward block after it.

Unstated in the paper: shapes, optimizer, data; ours here. What follows from
them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=samba_tiny
    python -m experiments.lm --config=samba_340m --describe

Measured (docs/results.md):
  tiny: 1.538 ± 0.008 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 20.63, 51.08.
  1b3: 16.13, 54.00.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("samba", arg, learning_rate=_common.PRESET_A)
