"""RetNet (arXiv 2307.08621) at the scale 1b3 of Table 1.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 1295.6M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: a decayed sum, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=retnet_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 19.08, average accuracy 52.02 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _retnet


def get_config(arg: str = "") -> _retnet.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _retnet.retnet("1b3", arg)
