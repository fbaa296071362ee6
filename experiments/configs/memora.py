"""Memora (Miras, arXiv 2504.13173): an MLP memory on a simplex.

Its retention is a KL divergence, and its weights stay positive and of a fixed
sum.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here. What
follows from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=memora_tiny
    python -m experiments.lm --config=memora_340m --describe

Measured (docs/results.md):
  tiny: 1.569 ± 0.032 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, arXiv version (Wiki perplexity, average accuracy):
  760m: 22.28, 51.53.
  1b3: 15.90, 55.76.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("memora", arg)
