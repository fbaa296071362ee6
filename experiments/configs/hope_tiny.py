"""HOPE with MLP memories, 0.4M parameters: the demonstration.

Reproduces: no row of the paper; the small setting of ours in which the four
  architectures are compared at equal parameters and tokens.
Unstated in the paper: everything here; its smallest model has 340M parameters.
Parameters: 438,992 = 357,072 slow weights + 81,920 memory initial states.
Tokens: 614,400 = 300 steps of 2,048; sequence length 256.
Levels: memory chunks 16 tokens, of the generators 16; CMS periods 2,048, 8,192,
  32,768 tokens.
Command: python -m experiments.lm --config=hope_tiny
Hardware: a laptop CPU, minutes.
Expected: about 1.70 nat/byte on the embedded corpus after 250 steps in the
  study of model.md section 9.
"""

from ml_collections import config_dict

from experiments.configs import _hope


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _hope.mlp("tiny", arg)
