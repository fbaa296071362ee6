"""Transformer++, 1.3B parameters.

Reproduces: Table 1, row "Transformer++", 1.3B parameters, 100B tokens.
Unstated in the paper: depth, width, heads, learning rate (preset A), context
  length, tying.
Parameters: 1,298,761,728 = 1,298,761,728 slow weights + 0 memory initial
  states.
Tokens: 100,000,071,680 = 190,735 steps of 524,288; sequence length 4096.
Levels: one feed-forward block, updated each step; no chunks.
Command: python -m experiments.lm --config=transformer_1b3 \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/transformer_1b3
Hardware: meant for TPU pods; not run.
Expected: Wiki perplexity 18.53, LAMBADA perplexity 18.32, mean accuracy 52.25
  (table1.csv, neurips_camera_ready, 1.3B); ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.transformer("1b3", arg)
