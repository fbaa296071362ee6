"""Gated DeltaNet (arXiv 2412.06464) at the scale 760m of Table 1.

Unstated in the paper: it is not a row of Table 1; shapes are ours.
Parameters: 758.1M in total.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=gated_deltanet_760m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.gated_deltanet("760m", arg)
