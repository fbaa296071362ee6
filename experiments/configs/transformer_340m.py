"""Transformer++ at the scale 340m of Table 1.

Unstated in the paper: shapes; ours here.
Parameters: 341.1M in total.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: no CMS.
Command: python -m experiments.lm --config=transformer_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.transformer("340m", arg)
