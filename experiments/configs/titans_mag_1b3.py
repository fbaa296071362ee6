"""Titans (MAG, arXiv 2501.00663), memory as gate, at the scale 1b3.

Unstated in the paper: shapes, chunk lengths, windows, optimizer, data; ours
here.
Parameters: 1302.0M in total, of these 25.2M initial states of memories.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64, attention to 1024 tokens; no CMS.
Command: python -m experiments.lm --config=titans_mag_1b3
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.mag("1b3", arg)
