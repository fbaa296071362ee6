"""TTT-Linear (arXiv 2407.04620) at the scale 1b3 of Table 1.

Unstated in the paper: linear or MLP, shapes, optimizer, data; ours here.
Parameters: 1304.5M in total, of these 3.2M initial states of memories.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=ttt_linear_1b3
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _ttt


def get_config(arg: str = "") -> _ttt.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _ttt.linear("1b3", arg)
