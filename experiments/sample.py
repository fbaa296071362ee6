"""Writes text with a trained model, token by token as it comes.

python -m experiments.sample --workdir=runs/hope_tiny --prompt="def "
"""

import pathlib
import sys

from absl import flags, logging

from experiments import _main

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; may be empty.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.9, "0: always the most likely token.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Mass of the most likely tokens to draw from, in (0, 1]."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)


def main() -> int:
  """Runs the command; returns its exit status."""
  if not _WORKDIR.value:
    raise ValueError("--workdir is required: the folder of a trained run")
  if not pathlib.Path(_WORKDIR.value).is_dir():
    raise ValueError(f"no folder {_WORKDIR.value}: give the --workdir of a run")
  logging.set_verbosity(logging.WARNING)  # Only the text, and mistakes.
  from experiments import _setup, _text
  from nl_jax.data import tokenizers
  from nl_jax.train import checkpoint

  config = _setup.from_plain(checkpoint.read_config(_WORKDIR.value))
  net = _setup.model(config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  _main.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  sys.stdout.write(_PROMPT.value)
  for piece in _text.generate(
    net,
    params,
    tokenizer,
    _PROMPT.value,
    _TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  ):
    sys.stdout.write(piece)
    sys.stdout.flush()
  sys.stdout.write("\n")
  return _main.DONE


if __name__ == "__main__":
  _main.run(main)
