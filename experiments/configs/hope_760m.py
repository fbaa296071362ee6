"""HOPE with MLP memories, 760M parameters.

Reproduces: Table 1, row "HOPE (ours)", 760M parameters, 30B tokens.
Unstated in the paper: depth, width, heads, width of a memory, chunks of a
  memory, number and periods of the CMS levels between the first and the last,
  learning rate, context length, tying.
Parameters: 762,328,128 = 715,142,208 slow weights + 47,185,920 memory initial
  states.
Tokens: 29,999,759,360 = 57,220 steps of 524,288; sequence length 4096.
Levels: memory chunks 64 tokens, of the generators 64; CMS periods 1,048,576,
  4,194,304, 16,777,216 tokens.
Command: python -m experiments.lm --config=hope_760m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_760m
Hardware: meant for TPU pods; not run.
Expected: Wiki perplexity 20.53, LAMBADA perplexity 20.47, mean accuracy 52.26
  (table1.csv, neurips_camera_ready, 760M); ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _hope


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _hope.mlp("760m", arg)
