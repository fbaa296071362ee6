"""Samba (arXiv 2406.07522), demonstration size; no row of the paper.

Unstated in the paper: shapes, optimizer, data; ours here.
Parameters: 0.439M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: Mamba at each token (computed 8 at once), attention to
64 tokens; no CMS.
Command: python -m experiments.lm --config=samba_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _samba


def get_config(arg: str = "") -> _samba.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _samba.samba("tiny", arg)
