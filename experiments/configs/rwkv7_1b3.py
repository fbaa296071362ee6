"""RWKV-7 (arXiv 2503.14456) at the scale 1b3.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 1302.5M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=rwkv7_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 18.44, average accuracy 55.30 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _rwkv


def get_config(arg: str = "") -> _rwkv.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _rwkv.rwkv7("1b3", arg)
