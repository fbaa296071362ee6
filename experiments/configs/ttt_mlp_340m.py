"""TTT-MLP (arXiv 2407.04620) at the scale 340m of Table 1.

Unstated in the paper: linear or MLP, shapes, optimizer, data; ours here.
Parameters: 340.5M in total, of these 12.7M initial states of memories.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=ttt_mlp_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _ttt


def get_config(arg: str = "") -> _ttt.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _ttt.mlp("340m", arg)
