"""HOPE-Attention, 340M parameters.

Reproduces: no row of Table 1; HOPE-Attention is compared elsewhere; the scale
  is that of its rows of 340M parameters and 15B tokens.
Unstated in the paper: depth, width, heads, learning rate, periods of the CMS
  levels between the first and the last, context length, tying.
Parameters: 345,867,264 = 345,867,264 slow weights + 0 memory initial states.
Tokens: 14,999,879,680 = 28,610 steps of 524,288; sequence length 4096.
Levels: CMS periods 1,048,576, 4,194,304, 16,777,216 tokens; no chunks.
Command: python -m experiments.lm --config=hope_attention_340m \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_attention_340m
Hardware: meant for TPU pods; not run.
Expected: nothing printed in the paper; ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.hope_attention("340m", arg)
