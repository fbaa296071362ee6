"""Transformer++, 760M parameters.

Reproduces: Table 1, row "Transformer++", 760M parameters, 30B tokens.
Unstated in the paper: depth, width, heads, learning rate (preset A), context
  length, tying.
Parameters: 757,016,064 = 757,016,064 slow weights + 0 memory initial states.
Tokens: 29,999,759,360 = 57,220 steps of 524,288; sequence length 4096.
Levels: one feed-forward block, updated each step; no chunks.
Command: python -m experiments.lm --config=transformer_760m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/transformer_760m
Hardware: meant for TPU pods; not run.
Expected: Wiki perplexity 25.21, LAMBADA perplexity 27.64, mean accuracy 48.69
  (table1.csv, neurips_camera_ready, 760M); ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.transformer("760m", arg)
