"""HOPE with MLP memories (eq. 94-97) at the scale 340m of Table 1.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 346.2M in total, of these 31.5M initial states of
memories.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; CMS 2^20, 2^22, 2^24 tokens.
Command: python -m experiments.lm --config=hope_340m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 26.05, average accuracy 46.90
(camera-ready Table 1); ours: not run.
"""

from experiments.configs import _hope


def get_config(arg: str = "") -> _hope.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _hope.mlp("340m", arg)
