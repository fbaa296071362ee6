"""HOPE with matrix memories at the scale 1b3 of Table 1.

Unstated in the paper: matrix memories are ours, the cheap form.
Parameters: 1280.7M in total, of these 31.5M initial states of
memories.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; CMS 2^20, 2^22, 2^24 tokens.
Command: python -m experiments.lm --config=hope_linear_1b3
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _hope


def get_config(arg: str = "") -> _hope.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _hope.linear("1b3", arg)
