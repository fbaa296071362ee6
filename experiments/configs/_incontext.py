"""Builders of the configs whose levels learn in context (paper eq. 71).

The models of `_hope` and `_attention` with a sliding window, of the same
parameters but a rate for each fast level. In the last quarter of the layers
the levels high and mid have weights of their own in each sequence, which learn
from the tokens as they are read (model.md 4.3). The paper states no value.
"""

from experiments.configs import _attention, _common, _hope

ConfigDict = _common.ConfigDict

# Tokens between two updates of high and mid; the window of attention.
_CHUNKS = {"smoke": (8, 32), "tiny": (32, 128)}
_WINDOW = {"smoke": 16, "tiny": 64}


def hope(size: str, arg: str) -> ConfigDict:
  """HOPE with MLP memories and levels that learn in context."""
  return _learning(_hope.mlp(size, arg), _common.size_of(size, arg))


def hope_attention(size: str, arg: str) -> ConfigDict:
  """HOPE-Attention with a sliding window; 0: attention to all tokens."""
  config = _attention.hope_attention(size, arg)
  size = _common.size_of(size, arg)
  config.model.mixer = ConfigDict(
    dict(
      window=_WINDOW.get(size, 1024),  # Tokens that each sees; 0: all.
    )
  )
  return _learning(config, size)


def _learning(config: ConfigDict, size: str) -> ConfigDict:
  """Adds how levels learn in context to `model.cms`."""
  config.model.cms.update(
    periods=(0, 0, 0),  # The starts of all levels learn in each step.
  )
  config.model.cms.update(
    dict(
      chunks=_CHUNKS.get(size, (512, 2048)),  # Tokens between updates.
      fast_levels=("high", "mid"),  # Which learn in context.
      fast_layers=0,  # The last so many layers; 0: a quarter.
      targets="inside",  # Of a chunk; or next, the token after it too.
      rule="sgd",  # Or momentum, dgd.
      rates=(0.1, 0.1),  # Inner learning rates at the start; learned.
      momentum=0.9,  # Of the rule of that name.
      clip=1.0,  # Largest norm of a level's inner gradient.
      reduce="mean",  # Over a chunk's tokens; or sum (literal eq. 71).
      outer="full",  # Or first_order: no gradient through inner ones.
      nested_meta="none",  # How starts learn, with variant=nested.
      nested_rate=0.1,  # Of reptile and fomaml.
      reset="sequence",  # Weights begin anew: or document.
      inner_loss="task",  # Or local_dot, local_l2: each layer its own.
    )
  )
  return config
