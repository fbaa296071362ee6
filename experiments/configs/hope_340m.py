"""HOPE with MLP memories, 340M parameters.

Reproduces: Table 1, row "HOPE (ours)", 340M parameters, 15B tokens (size and
  tokens inferred: the table has no header there).
Unstated in the paper: depth, width, heads, width of a memory, chunks of a
  memory, number and periods of the CMS levels between the first and the last,
  learning rate, context length, tying.
Parameters: 346,214,784 = 314,757,504 slow weights + 31,457,280 memory initial
  states.
Tokens: 14,999,879,680 = 28,610 steps of 524,288; sequence length 4096.
Levels: memory chunks 64 tokens, of the generators 64; CMS periods 1,048,576,
  4,194,304, 16,777,216 tokens.
Command: python -m experiments.lm --config=hope_340m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_340m
Hardware: meant for TPU pods; not run.
Expected: Wiki perplexity 26.05, LAMBADA perplexity 29.38, mean accuracy 46.90
  (table1.csv, neurips_camera_ready, 340M); ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _hope


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _hope.mlp("340m", arg)
