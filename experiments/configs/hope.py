"""HOPE: self-modifying Titans and a continuum memory system (eq. 94-97).

The memories are two-layer MLPs, as the paper has them: keys, values, rates and
retention come from memories that learn while they read, and the feed-forward
part is three levels, each with a period of its own. The argument `paper`
(hope_340m:paper) takes every switch at its literal reading.

Unstated in the paper: shapes, chunk lengths, optimizer, data; ours here. What
follows from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=hope_tiny
    python -m experiments.lm --config=hope_340m --describe

Measured (docs/results.md):
  tiny: 1.520 ± 0.009 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  340m: 26.05, 46.90.
  760m: 20.53, 52.26.
  1b3: 15.11, 57.23.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` or `paper` after a comma."""
  return _common.of_family("hope", arg)
