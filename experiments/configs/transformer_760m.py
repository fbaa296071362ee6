"""Transformer++ at the scale 760m of Table 1.

Unstated in the paper: shapes; ours here.
Parameters: 757.0M in total.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: no CMS.
Command: python -m experiments.lm --config=transformer_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 25.21, average accuracy 48.69
(camera-ready Table 1); ours: not run.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.transformer("760m", arg)
