"""Builders of the configs whose levels learn in context (paper eq. 71).

The models of `_hope` and `_attention` with a sliding window, of the same
parameters but a rate for each fast level. In the last quarter of the layers the
levels high and mid have weights of their own in each sequence, which learn from
the tokens as they are read (docs/mathematics.md 4.3). The paper states no
value.
"""

from typing import Any

from experiments.configs import _attention, _common, _hope

ConfigDict = _common.ConfigDict

# Tokens between two updates of high and mid; the window of attention.
_CHUNKS = {"smoke": (8, 32), "tiny": (32, 128)}
_WINDOW = {"smoke": 16, "tiny": 64}


def hope(size: str, arg: str) -> ConfigDict:
  """HOPE with MLP memories and levels that learn in context."""
  return _hope.mlp(size, arg, **_learning(_common.size_of(size, arg)))


def hope_attention(size: str, arg: str) -> ConfigDict:
  """HOPE-Attention with a sliding window; 0: attention to all tokens."""
  scale = _common.size_of(size, arg)
  window = dict(window=_WINDOW.get(scale, 1024))
  return _attention.hope_attention(
    size, arg, mixer=window, cms=_learning(scale)
  )


def _learning(size: str) -> dict[str, Any]:
  """Of `model.cms`, how levels learn in context."""
  return dict(
    periods=(0, 0, 0),  # The starts of all levels learn in each step.
    chunks=_CHUNKS.get(size, (512, 2048)),
    fast_levels=("high", "mid"),
    rates=(0.1, 0.1),
  )
