"""Deep linear attention (DLA, arXiv 2505.23735) at the scale 760m.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 760.7M in total, of these 9.4M initial states of memories.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; no CMS.
Command: python -m experiments.lm --config=dla_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 23.12, average accuracy 50.48 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.dla("760m", arg)
