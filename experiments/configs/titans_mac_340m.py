"""Titans (MAC, arXiv 2501.00663), memory as context, at the scale 340m.

Unstated in the paper: shapes, chunk lengths, windows, optimizer, data; ours
here.
Parameters: 339.0M in total, of these 12.6M initial states of memories.
Tokens: 15B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64, attention in segments of 1024; no CMS.
Command: python -m experiments.lm --config=titans_mac_340m
Hardware: a TPU slice; not run.
Expected: no row in the paper; ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.mac("340m", arg)
