"""What a run is, in text: its config, its parameters, its level card."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from nl_jax import build, card, data
from nl_jax.models import flops, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.train import optimizer, progress

_SHOWN = 60  # Characters of a row.


def config_text(config: build.ConfigDict) -> str:
  """Every field, one a line, as one would set it on the command line."""
  return "\n".join(_lines(config.to_dict(), "config"))


def _lines(node: dict[str, Any], prefix: str) -> Iterator[str]:
  for key, value in node.items():
    if isinstance(value, dict):
      yield from _lines(value, f"{prefix}.{key}")
    else:
      yield f"--{prefix}.{key}={value!r}"


def parameter_table(net: lm.LanguageModel) -> str:
  """Name, shape and size of every parameter, and exact totals by group."""
  params = jax.eval_shape(net.init, jax.random.key(0))
  rows = [("parameter", "shape", "dtype", "size")]
  groups: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(entry.key for entry in path)
    shape = "x".join(map(str, leaf.shape))
    rows.append((name, shape, str(leaf.dtype), f"{leaf.size:,}"))
    group = _group(name)
    groups[group] = groups.get(group, 0) + leaf.size
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
    f"{n:{widths[0]}}  {s:{widths[1]}}  {d:{widths[2]}}  {c:>{widths[3]}}"
    for n, s, d, c in rows
  ]
  total = sum(groups.values())
  lines += [f"{group}: {size:,}" for group, size in groups.items()]
  return "\n".join([*lines, f"total: {total:,} parameters"])


def batch_text(dataset: data.Dataset) -> str:
  """Shapes of the next training batch, and the start of its first row."""
  place = dataset.train.get_state()
  batch = next(dataset.train)
  dataset.train.set_state(place)
  shapes = ", ".join(f"{key} {list(x.shape)}" for key, x in batch.items())
  first_T = batch["inputs"][0][batch["segment_ids"][0] > 0]
  text = dataset.tokenizer.decode(first_T)[:_SHOWN]
  return f"first batch: {shapes}; its first row reads {text!r}"


def training_text(config: build.ConfigDict) -> str:
  """How much a run reads."""
  steps, tokens = config.train.steps, build.tokens_per_step(config)
  return (
    f"training: {steps:,} steps of {tokens:,} tokens ({config.data.batch_size} "
    f"rows of {config.data.sequence_length}), {steps * tokens:,} in all"
  )


def _group(name: str) -> str:
  if "/memory/" in name and "/gate/" not in name:
    return "initial states of memories"
  return "feed-forward levels" if "/cms/" in name else "other slow weights"


def card_text(
  config: build.ConfigDict,
  net: lm.LanguageModel | incontext.InContextModel,
  made: optimizer.Optimizer,
) -> str:
  """The level card: model and optimizer."""
  rows = [*net.levels()[0], *made.rows]
  return card.format_rows(rows, build.tokens_per_step(config))


def walk_text(config: build.ConfigDict, net: lm.LanguageModel) -> str:
  """Which walks over chunks a layer takes, here and on a TPU; "" of none."""
  lines = []
  for walk in build.walk_rows(build.walks(config, net)):
    why = walk["refused"]
    there = "its kernels" if why is None else f"XLA: {why}"
    lines.append(
      f"walk {walk['name']}, chunks of {walk['chunk']}: {walk['ran']} here; on "
      f"a TPU {there}"
    )
  return "\n".join(lines)


def sequence_text(config: build.ConfigDict, net: lm.LanguageModel) -> str:
  """How rows that are split over devices go through walks; "" where not.

  Raises:
    ValueError: they cannot be split so.
  """
  sizes = build.mesh_sizes(config, jax.device_count())
  shards = sizes["sequence"]
  if shards == 1:
    return ""
  fixed = math.prod(n for n in sizes.values() if n > 0)
  left = max(jax.device_count() // fixed, 1)
  sizes = {axis: left if n == -1 else n for axis, n in sizes.items()}
  build.check_sequence(config, shards)
  tokens = config.data.sequence_length
  waiting = [
    call.name
    for call in build.walks(config, net)
    if not call.affine and math.prod(call.places.real.shape[1:]) == tokens
  ]
  if not waiting:
    return f"mesh.sequence={shards}: no device waits for another in a walk"
  parts = sizes["replica"] * sizes["fsdp"] * config.train.accumulate
  rows = max(config.data.batch_size // parts, 1)
  steps = rows + shards - 1
  return (
    f"mesh.sequence={shards}: {rows} rows a device go through the walk "
    f"{' and '.join(dict.fromkeys(waiting))} in {steps} steps, of which a "
    f"device waits {shards - 1} ({(shards - 1) / steps:.0%})"
  )


def flops_text(config: build.ConfigDict, net: lm.LanguageModel) -> str:
  """What a token costs, as MFU counts it."""
  tokens = config.data.sequence_length
  parts = net.flops(tokens)
  shares = ", ".join(
    f"{name.replace('_', ' ')} {value / parts.total:.0%}"
    for name, value in parts._asdict().items()
    if value
  )
  return (
    f"FLOPs per token, mean over {tokens}: "
    f"{progress.short(parts.total)} forward ({shares}), "
    f"{progress.short(flops.training(net, tokens))} training"
  )
