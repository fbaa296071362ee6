"""HOPE with MLP memories (eq. 94-97) at the scale 760m of Table 1.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 762.3M in total, of these 47.2M initial states of
memories.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; CMS 2^20, 2^22, 2^24 tokens.
Command: python -m experiments.lm --config=hope_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 20.53, average accuracy 52.26
(camera-ready Table 1); ours: not run.
"""

from experiments.configs import _hope


def get_config(arg: str = "") -> _hope.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _hope.mlp("760m", arg)
