"""TTT-MLP (arXiv 2407.04620): MLPs trained by mini-batches of the context.

Table 1 has a row of TTT, without saying whether it is this or TTT-Linear.

Unstated in the paper: linear or MLP, shapes, optimizer, data; ours here. What
follows from them (parameters, FLOPs, levels, tokens) is printed by --describe:

    python -m experiments.lm --config=ttt_mlp_tiny
    python -m experiments.lm --config=ttt_mlp_340m --describe

Measured (docs/results.md):
  tiny: 1.574 ± 0.023 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected by Table 1, camera-ready version (Wiki perplexity, average accuracy):
  760m: 24.17, 47.32.
  340m, 1b3: no row.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("ttt_mlp", arg, learning_rate=_common.PRESET_A)
