"""Transformer++, 0.4M parameters: the demonstration.

Reproduces: no row of the paper; the small setting of ours in which the four
  architectures are compared at equal parameters and tokens.
Unstated in the paper: everything here; its smallest model has 340M parameters.
Parameters: 439,936 = 439,936 slow weights + 0 memory initial states.
Tokens: 614,400 = 300 steps of 2,048; sequence length 256.
Levels: one feed-forward block, updated each step; no chunks.
Command: python -m experiments.lm --config=transformer_tiny
Hardware: a laptop CPU, minutes.
Expected: about 1.90 nat/byte on the embedded corpus after 250 steps in the
  study of model.md section 9.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.transformer("tiny", arg)
