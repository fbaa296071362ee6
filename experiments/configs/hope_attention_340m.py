"""HOPE-Attention (paper eq. 97) at the scale 340m of Table 1.

Unstated in the paper: shapes, chunk lengths; ours here.
Parameters: 345.9M in total.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: CMS 2^20, 2^22, 2^24 tokens.
Command: python -m experiments.lm --config=hope_attention_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.hope_attention("340m", arg)
