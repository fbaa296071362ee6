"""HOPE with matrix memories, demonstration size; no row of the paper.

Unstated in the paper: matrix memories are ours, the cheap form.
Parameters: 0.440M in total, of these 0.041M initial states of
memories.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: memories 16; CMS 2048, 8192, 32768 tokens (1, 4, 16 steps).
Command: python -m experiments.lm --config=hope_linear_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _hope


def get_config(arg: str = "") -> _hope.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _hope.linear("tiny", arg)
