"""Memora (Miras, arXiv 2504.13173) at the scale 760m.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here.
Parameters: 755.2M in total, of these 9.4M initial states of memories.
Tokens: 30B tokens, 2^19 a step, sequences of 4096.
Chunks and periods: memories 16; no CMS.
Command: python -m experiments.lm --config=memora_760m
Hardware: a TPU slice; not run.
Expected: Wiki perplexity 22.28, average accuracy 51.53 (Table 1 of the arXiv
version; the camera-ready one has no such row); ours: not run.
"""

from experiments.configs import _titans


def get_config(arg: str = "") -> _titans.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _titans.memora("760m", arg)
