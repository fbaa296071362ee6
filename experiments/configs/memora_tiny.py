"""Memora (Miras, arXiv 2504.13173), demonstration size.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 0.442M in total, of these 0.033M initial states of memories.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=memora_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.memora("tiny", arg)
