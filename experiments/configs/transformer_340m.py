"""Transformer++, 340M parameters.

Reproduces: no row of Table 1; the row is missing at this size; the scale is
  that of its rows of 340M parameters and 15B tokens.
Unstated in the paper: depth, width, heads, learning rate (preset A), context
  length, tying.
Parameters: 341,099,520 = 341,099,520 slow weights + 0 memory initial states.
Tokens: 14,999,879,680 = 28,610 steps of 524,288; sequence length 4096.
Levels: one feed-forward block, updated each step; no chunks.
Command: python -m experiments.lm --config=transformer_340m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/transformer_340m
Hardware: meant for TPU pods; not run.
Expected: nothing printed in the paper; ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.transformer("340m", arg)
