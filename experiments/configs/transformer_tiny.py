"""Transformer++, demonstration size; no row of the paper.

Unstated in the paper: shapes; ours here.
Parameters: 0.440M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: no CMS.
Command: python -m experiments.lm --config=transformer_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.transformer("tiny", arg)
