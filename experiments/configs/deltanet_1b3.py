"""DeltaNet (arXiv 2406.06484) at the scale 1b3 of Table 1.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 1300.1M in total.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=deltanet_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 17.71, average accuracy 52.14 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.deltanet("1b3", arg)
