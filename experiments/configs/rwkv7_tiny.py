"""RWKV-7 (arXiv 2503.14456), demonstration size; no row of the paper.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 0.438M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: the delta rule, at each token (computed 16 at once); no
CMS.
Command: python -m experiments.lm --config=rwkv7_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _rwkv


def get_config(arg: str = "") -> _rwkv.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _rwkv.rwkv7("tiny", arg)
