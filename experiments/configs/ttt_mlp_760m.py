"""TTT-MLP (arXiv 2407.04620) at the scale 760m of Table 1.

Unstated in the paper: linear or MLP, shapes, optimizer, data; ours here.
Parameters: 763.5M in total, of these 19.1M initial states of memories.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=ttt_mlp_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 24.17, average accuracy 47.32 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _ttt


def get_config(arg: str = "") -> _ttt.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _ttt.mlp("760m", arg)
