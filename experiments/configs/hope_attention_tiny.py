"""HOPE-Attention (paper eq. 97), demonstration size; no row of the paper.

Unstated in the paper: shapes, chunk lengths; ours here.
Parameters: 0.440M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: CMS 2048, 8192, 32768 tokens (1, 4, 16 steps).
Command: python -m experiments.lm --config=hope_attention_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.hope_attention("tiny", arg)
