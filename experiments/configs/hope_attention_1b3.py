"""HOPE-Attention (paper eq. 97) at the scale 1b3 of Table 1.

Unstated in the paper: shapes, chunk lengths; ours here.
Parameters: 1289.4M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: CMS 2^20, 2^22, 2^24 tokens.
Command: python -m experiments.lm --config=hope_attention_1b3
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.hope_attention("1b3", arg)
