"""Titans, LMM (arXiv 2501.00663): a deep memory that learns by momentum.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here. What
follows from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=titans_lmm_tiny
    python -m experiments.lm --config=titans_lmm_340m --describe

Measured (docs/results.md):
  tiny: 1.546 ± 0.010 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 20.04, 51.56.
  1b3: 15.60, 56.82.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("titans_lmm", arg)
