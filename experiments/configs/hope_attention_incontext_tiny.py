"""HOPE-Attention whose levels learn in context (eq. 71, 97), demonstration
size;
no row of the paper.

Unstated in the paper: shapes, chunk lengths, inner rule and rates; ours here.
Parameters: 0.440M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: window 64; high 32, mid 128 tokens in context.
Command: python -m experiments.lm --config=hope_attention_incontext_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _incontext


def get_config(arg: str = "") -> _incontext.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _incontext.hope_attention("tiny", arg)
