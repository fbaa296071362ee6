"""Comba (arXiv 2506.02475) at the scale 1b3.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 1303.7M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=comba_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 18.16, average accuracy 55.39 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.comba("1b3", arg)
