"""Gated DeltaNet (arXiv 2412.06464), demonstration size; no row of the paper.

Unstated in the paper: it is not a row of Table 1; shapes are ours.
Parameters: 0.438M in total.
Tokens: 614,400 tokens (300 steps), 2,048 a step, sequences of 256 bytes.
Chunks and periods: the delta rule, at each token (computed 16 at once); no
CMS.
Command: python -m experiments.lm --config=gated_deltanet_tiny
Hardware: 2 CPU cores, minutes.
Expected: nat per byte on the embedded corpus, see docs/results.md.
"""

from experiments.configs import _delta


def get_config(arg: str = "") -> _delta.ConfigDict:
  """See above; `smoke` in arg gives the test size."""
  return _delta.gated_deltanet("tiny", arg)
