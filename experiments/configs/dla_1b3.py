"""Deep linear attention (DLA, arXiv 2505.23735) at the scale 1b3.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 1300.9M in total, of these 12.6M initial states of memories.
Tokens: 100B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 64; no CMS.
Command: python -m experiments.lm --config=dla_1b3
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 16.31, average accuracy 53.72 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.dla("1b3", arg)
