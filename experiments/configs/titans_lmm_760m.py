"""Titans (LMM, arXiv 2501.00663) at the scale 760m of Table 1.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 761.1M in total, of these 9.4M initial states of memories.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; no CMS.
Command: python -m experiments.lm --config=titans_lmm_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 20.04, average accuracy 51.56 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.lmm("760m", arg)
