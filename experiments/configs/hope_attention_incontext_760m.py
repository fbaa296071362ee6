"""HOPE-Attention whose levels learn in context (eq. 71, 97), at the scale 760m
of Table 1.

Unstated in the paper: shapes, chunk lengths, inner rule and rates; ours here.
Parameters: 764.2M in total.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: window 1024; high 512, mid 2048 tokens in context.
Command: python -m experiments.lm --config=hope_attention_incontext_760m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _incontext


def get_config(arg: str = "") -> _incontext.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _incontext.hope_attention("760m", arg)
