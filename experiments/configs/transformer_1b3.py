"""Transformer++ at the scale 1b3 of Table 1.

Unstated in the paper: shapes; ours here.
Parameters: 1298.8M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: no CMS.
Command: python -m experiments.lm --config=transformer_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 18.53, average accuracy 52.25
(camera-ready Table 1); ours: not run.
"""

from experiments.configs import _attention


def get_config(arg: str = "") -> _attention.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _attention.transformer("1b3", arg)
