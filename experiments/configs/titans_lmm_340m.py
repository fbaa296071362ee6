"""Titans (LMM, arXiv 2501.00663) at the scale 340m of Table 1.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 340.4M in total, of these 6.3M initial states of memories.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; no CMS.
Command: python -m experiments.lm --config=titans_lmm_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.lmm("340m", arg)
