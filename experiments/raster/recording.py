"""What the levels of a model do, chunk by chunk, while it reads."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nl_jax import files
from nl_jax.levels import NONPARAMETRIC

_FIELDS = ("update_norm", "memory_norm", "inner_loss")


class Trace(NamedTuple):
  """A reading in chunks of the fastest memory.

  Attributes:
    ends: tokens read at the end of each chunk.
    nats: of each token; the first has none: NaN.
    levels: by memory: means over a chunk's tokens, layers and heads of
      `update_norm`, `memory_norm` and `inner_loss`, [chunks] each. By level
      that learns in context, from the nats: norms of its change in the chunk
      and of its weights.
  """

  ends: list[int]
  nats: np.ndarray
  levels: dict[str, dict[str, list[float]]]


def trace(net: Any, params: Any, ids_T: np.ndarray) -> Trace:
  """Reads tokens and keeps what the memories measured.

  Args:
    net, params: the model.
    ids_T: tokens; what is left behind the last whole chunk is not read.

  Raises:
    ValueError: fewer tokens than a chunk.
  """
  size = min(chunks(net).values())
  count = len(ids_T) // size
  if not count:
    raise ValueError(
      f"the text has {len(ids_T)} tokens, a chunk takes {size}; give more text"
    )

  @jax.jit
  def read(state: Any, before: jax.Array, ids: jax.Array) -> tuple:
    logits, state, metrics = net.apply(params, ids, state)
    ahead = jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(ahead, ids[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(ahead, axis=-1) - chosen
    means = {
      name: {
        f: jnp.sum(getattr(m, f)) / jnp.maximum(jnp.sum(m.count), 1)
        for f in _FIELDS
      }
      for name, m in metrics.items()
    }
    return state, logits[:, -1], nats, means

  @jax.jit
  def norms(state: Any, after: Any) -> dict:
    theta = lambda state: {
      f"cms/{name}": at.params
      for name, at in getattr(state, "levels", {}).items()
    }
    old, new = theta(state), theta(after)
    moved = jax.tree.map(jnp.subtract, new, old)
    return {
      name: {
        "update_norm": optax.tree.norm(moved[name]),
        "memory_norm": optax.tree.norm(new[name]),
      }
      for name in new
    }

  state = net.init_state(params, 1, count * size)
  before = jnp.full((1, net.vocab_size), jnp.nan)
  ends, nats, levels = [], [], {}
  for i in range(count):
    ids = jnp.asarray(ids_T[i * size : (i + 1) * size], jnp.int32)[None]
    old = state
    state, before, some, means = read(state, before, ids)
    means |= norms(old, state)
    ends.append((i + 1) * size)
    nats.append(np.asarray(some)[0])
    for name, values in means.items():
      level = levels.setdefault(name, {f: [] for f in values})
      for field, value in values.items():
        level[field].append(float(value))
  return Trace(ends, np.concatenate(nats), levels)


def chunks(net: Any) -> dict[str, int]:
  """Tokens between two updates of the levels that change while it reads."""
  return {
    row.name: row.chunk
    for row in net.levels()[0]
    if row.state_bytes and row.chunk > 1
  }


def draw(shown: Trace, net: Any, path: pathlib.Path) -> None:
  """The picture: lanes, norms and surprise over the same tokens."""
  from nl_jax.report import charts

  figure = charts.new_figure((11.0, 8.0))
  lanes, norms, surprise = figure.subplots(
    3, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 1, 1]}
  )
  moving = chunks(net)
  still = [
    row.name
    for row in net.levels()[0]
    if row.name not in moving and row.chunk != NONPARAMETRIC
  ]
  names = [*shown.levels, *still]
  for place, name in enumerate(names):
    norm = shown.levels.get(name, {}).get("update_norm", [])
    marks = [end for end, x in zip(shown.ends, norm) if x > 0]
    colour = charts.COLOURS[place % len(charts.COLOURS)]
    lanes.eventplot(
      marks or [[]], lineoffsets=-place, linelengths=0.7, colors=colour
    )
  labels = [*shown.levels, *(f"{name} (in training only)" for name in still)]
  lanes.set_yticks([-i for i in range(len(names))], map(charts.plain, labels))
  lanes.set_ylim(-len(names) + 0.4, 0.6)
  _title(lanes, "Chunks in which a level's weights changed")
  for place, (name, level) in enumerate(shown.levels.items()):
    colour, name = charts.COLOURS[place], charts.plain(name)
    norms.plot(shown.ends, level["memory_norm"], color=colour, label=name)
    norms.plot(
      shown.ends, level["update_norm"], "--", color=colour,
      label=f"{name}, a write",
    )  # fmt: skip
    if "inner_loss" in level:
      surprise.plot(
        shown.ends, level["inner_loss"], color=colour,
        label=f"{name}, inner loss",
      )  # fmt: skip
  norms.set_yscale("log")
  _title(norms, "Norm of the fast weights, and of a token's write")
  width = len(shown.nats) // len(shown.ends)
  means = np.nanmean(shown.nats.reshape(-1, width), axis=1)
  surprise.plot(shown.ends, means, color="#7d858f", label="nat per token")
  _title(surprise, "Surprise, mean of a chunk")
  surprise.set_xlabel("tokens read")
  for axes in (norms, surprise):
    axes.legend(fontsize=8, frameon=False, ncols=3)
    axes.grid(True, alpha=0.2)
  with files.replacing(path) as file:
    figure.savefig(file, format="png", dpi=110, facecolor="white")


def _title(axes: Any, text: str) -> None:
  axes.set_title(text, fontsize=10, loc="left")
