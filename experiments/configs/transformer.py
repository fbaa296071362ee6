"""Transformer++: softmax attention and a SwiGLU block.

Unstated in the paper: shapes; ours here. What follows from them (parameters,
FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=transformer_tiny
    python -m experiments.lm --config=transformer_340m --describe

Measured (docs/results.md):
  tiny: 1.797 ± 0.030 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 25.21, 48.69.
  1b3: 18.53, 52.25.
  340m: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("transformer", arg, learning_rate=_common.PRESET_A)
