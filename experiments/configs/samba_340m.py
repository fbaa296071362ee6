"""Samba (arXiv 2406.07522) at the scale 340m of Table 1.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 337.7M in total.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: Mamba at each token (computed 64 at once), attention to
2048 tokens; no CMS.
Command: python -m experiments.lm --config=samba_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _samba


def get_config(arg: str = "") -> _samba.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _samba.samba("340m", arg)
