"""RWKV-7 (arXiv 2503.14456): the delta rule with a decay for each channel.

It learns at each token; a chunk is what is computed at once, and changes no
number.

Unstated in the paper: shapes, optimizer, data; ours here. What follows from
them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=rwkv7_tiny
    python -m experiments.lm --config=rwkv7_340m --describe

Measured (docs/results.md):
  tiny: 1.598 ± 0.016 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, arXiv version (Wiki perplexity, average accuracy):
  760m: 23.75, 50.55.
  1b3: 18.44, 55.30.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("rwkv7", arg, learning_rate=_common.PRESET_A)
