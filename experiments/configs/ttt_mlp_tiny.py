"""TTT-MLP (arXiv 2407.04620), demonstration size; no row of the paper.

Unstated in the paper: linear or MLP, shapes, optimizer, data; ours here.
Parameters: 0.442M in total, of these 0.067M initial states of memories.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=ttt_mlp_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _ttt


def get_config(arg: str = "") -> _ttt.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _ttt.mlp("tiny", arg)
