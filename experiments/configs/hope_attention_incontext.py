"""HOPE-Attention whose levels learn in context (eq. 71, 97).

`hope_attention` with a sliding window and a rate for each fast level: in the
last quarter of the layers the levels high and mid have weights of their own in
each sequence, which learn from the tokens as they are read (docs/mathematics.md
4.3). `--config.model.mixer.window=0` gives attention to all tokens.

Unstated in the paper: shapes, chunk lengths, windows, inner rule and rates;
ours here. What follows from them (parameters, FLOPs, levels, tokens) is printed
by --describe:

    python -m experiments.lm --config=hope_attention_incontext_tiny
    python -m experiments.lm --config=hope_attention_incontext_340m --describe

Measured (docs/results.md):
  tiny: 1.551 ± 0.019 nat per byte, 3 seeds; two CPU cores, minutes.
  340m, 760m, 1b3: not run; a TPU slice.
Expected: no row of Table 1.
"""

from experiments.configs import _common


def get_config(arg: str = "tiny") -> _common.ConfigDict:
  """See above; arg: a size, then `smoke` after a comma."""
  return _common.of_family("hope_attention_incontext", arg)
