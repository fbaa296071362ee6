"""DeltaNet (arXiv 2406.06484) at the scale 760m of Table 1.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 757.9M in total.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: the delta rule, at each token (computed 64 at once); no
CMS.
Command: python -m experiments.lm --config=deltanet_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 24.37, average accuracy 48.97 (camera-ready Table 1);
ours: not run.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.deltanet("760m", arg)
