"""HOPE-Attention, 1.3B parameters.

Reproduces: no row of Table 1; HOPE-Attention is compared elsewhere; the scale
  is that of its rows of 1.3B parameters and 100B tokens.
Unstated in the paper: depth, width, heads, learning rate, periods of the CMS
  levels between the first and the last, context length, tying.
Parameters: 1,289,422,848 = 1,289,422,848 slow weights + 0 memory initial
  states.
Tokens: 100,000,071,680 = 190,735 steps of 524,288; sequence length 4096.
Levels: CMS periods 1,048,576, 4,194,304, 16,777,216 tokens; no chunks.
Command: python -m experiments.lm --config=hope_attention_1b3 \\
  --config.data.path=<text> --config.data.tokenizer=<32K .model> \\
  --workdir=gs://<bucket>/hope_attention_1b3
Hardware: meant for TPU pods; not run.
Expected: nothing printed in the paper; ours: not run.
"""

from ml_collections import config_dict

from experiments.configs import _attention


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config; arg: see the builder."""
  return _attention.hope_attention("1b3", arg)
