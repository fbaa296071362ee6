"""Comba (arXiv 2506.02475): the delta rule with a corrected query.

Shapes of Gated DeltaNet. It learns at each token; a chunk is what is computed
at once, and changes no number.

Unstated in the paper: shapes, optimizer, data; ours here. What follows from
them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=comba_tiny
    python -m experiments.lm --config=comba_340m --describe

Measured (docs/results.md):
  tiny: 1.611 ± 0.007 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, arXiv version (Wiki perplexity, average accuracy):
  760m: 22.41, 50.89.
  1b3: 18.16, 55.39.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("comba", arg, learning_rate=_common.PRESET_A)
