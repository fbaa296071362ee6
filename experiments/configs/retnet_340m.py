"""RetNet (arXiv 2307.08621) at the scale 340m of Table 1.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 338.0M in total.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: a decayed sum, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=retnet_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _retnet


def get_config(arg: str = "") -> _retnet.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _retnet.retnet("340m", arg)
