"""What each mixer costs against Transformer++ as the text grows, and a plot.

One layer's mixer, without its feed-forward part, at the width and with the
switches of its tiny config (Samba: its pair of layers, and the feed-forward
part between them; RWKV-7: all of its layer): a gradient with respect to its
input and parameters, and tokens decoded one at a time after T tokens.

Attention runs as one head of the full width and not as four: four would keep
4.3 GB of scores in each array of a gradient at 16K tokens. That is the faster
form, so the ratios flatter it. Most of a run's time is compiling.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

_LENGTHS = (512, 2048, 4096, 16384)
_GROWTH = (4096, 16384)  # Lengths whose times give the exponent.
_PIECE = 512  # Tokens of a call while a text is read.
_DECODED = 64  # Tokens, so that a call's own cost does not count.
_BASE = "transformer"
_LINEAR = 1.5  # Half-way, in logarithms, from linear to quadratic.
_KINDS = {"train": "forward and backward", "decode": "a decoded token"}


def run(least_seconds: Callable, output: str) -> list[dict]:
  """Ratios at every length, growth, and the picture beside the JSON rows.

  Args:
    least_seconds: of `bench`.
    output: of the rows, whose name the picture takes with .png; "": none.

  Raises:
    ValueError: the picture already exists.
  """
  from nl_jax.models import lm

  picture = pathlib.Path(output).with_suffix(".png") if output else None
  if picture and picture.exists():
    raise ValueError(f"{picture} exists: name another --output or remove it")
  times = {kind: {name: [] for name in lm.MIXERS} for kind in _KINDS}
  for tokens in _LENGTHS:
    for kind, make in (("train", gradient), ("decode", _decoding)):
      functions = {name: make(_model(name), tokens) for name in lm.MIXERS}
      for name, seconds in least_seconds(functions).items():
        times[kind][name].append(seconds)
  if picture:
    _draw(times, picture)
  return [*_ratios(times), *_exponents(times)]


def _model(name: str) -> Any:
  """The tiny model of a mixer with one layer, or one unit of its stack."""
  from experiments.cli import named
  from nl_jax import build
  from nl_jax.models.mixers.attention import mixer as attention

  net = one_unit(build.model(build.resolve(named.load_config(f"{name}_tiny"))))
  if net.module is attention:
    return dataclasses.replace(net, heads=1, head_dim=net.width)
  return net


def one_unit(net: Any) -> Any:
  """A model with one layer, or with one unit of its stack."""
  depth = 2 if net.whole else getattr(net.module, "LAYERS", 1)
  return dataclasses.replace(net, layers=depth)


def _layer(net: Any) -> Any:
  """Parameters of the one layer, or the first."""
  import jax

  blocks = net.init(jax.random.key(0))["blocks"]
  blocks = net.module.laid(blocks) if net.whole else blocks
  return jax.tree.map(lambda x: x[0], blocks)


def _mix(net: Any, params: Any, x: Any, state: Any) -> tuple[Any, Any]:
  """The residual stream after a mixer, and its state."""
  x = net.module.enter(x) if net.whole else x
  y, state, _ = net.mix(params, x, state, None)
  return net.module.leave(y) if net.whole else y, state


def _draws(net: Any, tokens: int, rows: int = 1) -> Any:
  """A residual stream, [B,T,D]."""
  import jax

  shape = rows, tokens, net.width
  return jax.random.normal(jax.random.key(1), shape, net.dtype)


def gradient(net: Any, tokens: int, rows: int = 1) -> functools.partial:
  """One gradient through a mixer: a compiled function and its arguments."""
  import jax
  import jax.numpy as jnp

  @jax.jit
  def grad(params: Any, x: Any) -> Any:
    fixed = {k: v for k, v in params["mixer"].items() if k == "first"}

    def loss(p: Any, x: Any) -> Any:
      p = p | {"mixer": p["mixer"] | fixed}
      return jnp.sum(jnp.square(_mix(net, p, x, None)[0].astype(jnp.float32)))

    learned = {k: v for k, v in params["mixer"].items() if k not in fixed}
    return jax.grad(loss, (0, 1))(params | {"mixer": learned}, x)

  return functools.partial(grad, _layer(net), _draws(net, tokens, rows))


@functools.cache
def _reader(net: Any) -> tuple[Callable, Callable]:
  """(read a piece, decode tokens [T,1,1,D]), compiled once a state's shape."""
  import jax

  def step(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    y, state = _mix(net, params, x, state)
    return state, y

  def decode(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    return jax.lax.scan(functools.partial(step, params), state, x)

  return jax.jit(step), jax.jit(decode)


def _decoding(net: Any, tokens: int) -> Callable[[], Any]:
  """`_DECODED` tokens, one at a time, after a text of T tokens."""
  import jax.numpy as jnp

  read, decode = _reader(net)
  params, x = _layer(net), _draws(net, tokens + _DECODED)
  length = tokens + _DECODED
  state = net.module.init_state(params["mixer"], 1, length, model=net)
  for begin in range(0, tokens, _PIECE):
    state, _ = read(params, state, x[:, begin : begin + _PIECE])
  rest = jnp.swapaxes(x[:, tokens:], 0, 1)[:, None]
  return functools.partial(decode, params, state, rest)


def _ratios(times: dict) -> list[dict]:
  rows = []
  for kind, words in _KINDS.items():
    for i, tokens in enumerate(_LENGTHS):
      base = times[kind][_BASE][i]
      for name, seconds in times[kind].items():
        if name != _BASE:
          rows.append(
            dict(
              what=f"{words}, {name} / {_BASE}, {tokens:,} tokens",
              ratio=seconds[i] / base,
              target="reported",
            )
          )
  return rows


def _exponents(times: dict) -> list[dict]:
  """The power of T that a gradient's time grows with."""
  from nl_jax.models import lm
  from nl_jax.models.mixers.attention import mixer as attention

  a, b = (_LENGTHS.index(tokens) for tokens in _GROWTH)
  rows = []
  for name, seconds in times["train"].items():
    grown = math.log(seconds[b] / seconds[a])
    full = lm.MIXERS[name] is attention
    rows.append(
      dict(
        what=f"growth exponent of {_KINDS['train']}, {name}, {_GROWTH[0]:,} to "
        f"{_GROWTH[1]:,} tokens ({seconds[b]:.2f} s)",
        ratio=grown / math.log(_GROWTH[1] / _GROWTH[0]),
        target="reported" if full else f"<= {_LINEAR:g}",
      )
    )
  return rows


def _draw(times: dict, path: pathlib.Path) -> None:
  """Seconds a token over the length of the text, a line a mixer."""
  from nl_jax.report import charts

  figure = charts.new_figure((12.0, 5.0))
  panels = figure.subplots(1, len(_KINDS))
  for axes, (kind, words) in zip(panels, _KINDS.items()):
    curves = []
    for i, (name, seconds) in enumerate(times[kind].items()):
      counts = _LENGTHS if kind == "train" else (_DECODED,) * len(_LENGTHS)
      each = [1e6 * s / n for s, n in zip(seconds, counts)]
      colours = len(charts.COLOURS)
      curve = charts.Curve(name, list(_LENGTHS), each, i, i // colours)
      curves.append(curve)
    title = f"{words.capitalize()}: microseconds a token"
    charts.draw(axes, charts.Panel(title, "tokens", curves, True), "#333a42")
    axes.set_xscale("log", base=2)
    axes.set_xticks(_LENGTHS, [f"{n // 1024}K" if n >= 1024 else str(n)
                               for n in _LENGTHS])  # fmt: skip
    lines, names = axes.get_legend_handles_labels()
    axes.get_legend().remove()
  figure.legend(lines, names, loc="outside right upper", frameon=False)
  figure.savefig(path, format="png", dpi=110, facecolor="white")
