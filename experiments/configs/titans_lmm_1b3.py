"""Titans (LMM, arXiv 2501.00663) at the scale 1b3 of Table 1.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 1301.7M in total, of these 12.6M initial states of memories.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; no CMS.
Command: python -m experiments.lm --config=titans_lmm_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 15.60, average accuracy 56.82 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.lmm("1b3", arg)
