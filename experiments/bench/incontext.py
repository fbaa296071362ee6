"""What learning in context costs: a train step, and a token of decoding."""

from collections.abc import Callable
from typing import Any

_LAYERS = 8  # So that a quarter of them has fast levels.
_MARKS = (2**10, 2**14, 2**18)  # Tokens read before a token is timed.
_TOKENS = 128  # Decoded at once: whole micro-chunks of the configs below.


def steps(stepper: Callable, least_seconds: Callable) -> list[dict]:
  """A train step against the plain chain, second and first order.

  Args:
    stepper: (config name, change of the config) -> a function of no arguments
      that makes a step.
    least_seconds: of `bench`.
  """
  rows = []
  for name in ("hope_attention_incontext_tiny", "hope_incontext_tiny"):
    forms = {"plain": _plain, "full": _full, "first_order": _first_order}
    times = least_seconds({k: stepper(name, f) for k, f in forms.items()})
    for form, target in (("full", "<= 3.5"), ("first_order", "<= 2.2")):
      rows.append(
        dict(
          what=f"train step, {name} of {_LAYERS} layers, outer={form} / the "
          "plain chain",
          ratio=times[form] / times["plain"],
          target=target,
        )
      )
  return rows


def _full(config: Any) -> None:
  config.model.layers = _LAYERS


def _first_order(config: Any) -> None:
  _full(config)
  config.model.cms.outer = "first_order"


def _plain(config: Any) -> None:
  import dataclasses

  from nl_jax.models.incontext import model as incontext

  _full(config)
  for field in dataclasses.fields(incontext.Options):
    del config.model.cms[field.name]


def decode(least_seconds: Callable) -> list[dict]:
  """Seconds of a decoded token after 1K, 16K and 256K tokens, and bytes.

  For models without attention to all tokens; the contexts are read in full.

  Args:
    least_seconds: of `bench`.
  """
  import jax
  import numpy as np

  from experiments.cli import named
  from nl_jax import build, stream

  rows = []
  rng = np.random.default_rng(0)
  for name in (
    "hope_attention_incontext_tiny",
    "hope_linear_tiny",
    "hope_incontext_tiny",
  ):
    net = build.model(build.resolve(named.load_config(name)))
    params = net.init(jax.random.key(0))
    reader, states, read = stream.start(net, params), {}, 0
    for mark in _MARKS:
      reader.read(rng.integers(3, 259, (1, mark - read)))
      states[mark], read = stream.clone(reader.state), mark
    tokens = rng.integers(3, 259, (_TOKENS, 1, 1))

    def run(
      state: Any, net: Any = net, params: Any = params, tokens: Any = tokens
    ) -> Any:
      one = stream.Stream(net, params, stream.clone(state), None)
      for token in tokens:
        logits = one.read(token)
      return logits

    times = least_seconds(
      {mark: lambda s=state: run(s) for mark, state in states.items()}
    )
    size = {
      mark: sum(x.nbytes for x in jax.tree.leaves(state))
      for mark, state in states.items()
    }
    for mark in _MARKS[1:]:
      rows.append(
        dict(
          what=f"decoding, {name}: a token after {mark:,} tokens / after "
          f"{_MARKS[0]:,} ({1e3 * times[mark] / _TOKENS:.2f} ms); state "
          f"{size[mark]:,} and {size[_MARKS[0]]:,} bytes",
          ratio=times[mark] / times[_MARKS[0]],
          target="0.9 - 1.1",
        )
      )
  return rows
