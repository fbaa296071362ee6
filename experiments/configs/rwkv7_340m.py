"""RWKV-7 (arXiv 2503.14456) at the scale 340m.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 339.8M in total.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=rwkv7_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _rwkv


def get_config(arg: str = "") -> _rwkv.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _rwkv.rwkv7("340m", arg)
