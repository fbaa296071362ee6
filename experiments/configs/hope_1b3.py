"""HOPE with MLP memories, 1.3B parameters.

Reproduces: Table 1, row "HOPE (ours)", 1.3B parameters, 100B tokens.
Unstated in the paper: depth, width, heads, width of a memory, chunks of a
  memory, number and periods of the CMS levels between the first and the last,
  learning rate, context length, tying.
Parameters: 1,312,134,912 = 1,249,220,352 slow weights + 62,914,560 memory
  initial states.
Tokens: 100,000,071,680 = 190,735 steps of 524,288; sequence length 4096.
Levels: memory chunks 64 tokens, of the generators 64; CMS periods 1,048,576,
  4,194,304, 16,777,216 tokens.
Command: python -m experiments.lm --config=hope_1b3 \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_1b3
Hardware: meant for TPU pods; not run.
Expected: Wiki perplexity 15.11, LAMBADA perplexity 11.63, mean accuracy 57.23
  (table1.csv, neurips_camera_ready, 1.3B); ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _hope


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _hope.mlp("1b3", arg)
