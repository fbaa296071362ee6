"""HOPE-Attention: softmax attention and a continuum memory system (eq. 97).

Transformer++ whose feed-forward part is three levels, each with a period of its
own; with one level they are the same.

Unstated in the paper: shapes, chunk lengths; ours here. What follows from them
(parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=hope_attention_tiny
    python -m experiments.lm --config=hope_attention_340m --describe

Measured (docs/results.md):
  tiny: 2.081 ± 0.028 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("hope_attention", arg)
