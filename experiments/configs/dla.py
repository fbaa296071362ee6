"""Deep linear attention (DLA, arXiv 2505.23735).

The MLP memory of Titans with the inner objective of linear attention, without
momentum.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here. What
follows from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=dla_tiny
    python -m experiments.lm --config=dla_340m --describe

Measured (docs/results.md):
  tiny: 1.513 ± 0.011 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, arXiv version (Wiki perplexity, average accuracy):
  760m: 23.12, 50.48.
  1b3: 16.31, 53.72.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("dla", arg)
