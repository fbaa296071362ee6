"""HOPE with linear (matrix) memories, 760M parameters.

Reproduces: no row of Table 1; linear memories are ours, at the scale of its
  rows of 760M parameters and 30B tokens.
Unstated in the paper: depth, width, heads, learning rate, periods of the CMS
  levels between the first and the last, context length, tying.
Parameters: 748,171,392 = 736,374,912 slow weights + 11,796,480 memory initial
  states.
Tokens: 29,999,759,360 = 57,220 steps of 524,288; sequence length 4096.
Levels: memory chunks 16 tokens, of the generators 16; CMS periods 1,048,576,
  4,194,304, 16,777,216 tokens.
Command: python -m experiments.lm --config=hope_linear_760m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_linear_760m
Hardware: meant for TPU pods; not run.
Expected: nothing printed in the paper; ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _hope


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _hope.linear("760m", arg)
