"""Comba (arXiv 2506.02475) at the scale 760m.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 758.1M in total.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=comba_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 22.41, average accuracy 50.89 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.comba("760m", arg)
