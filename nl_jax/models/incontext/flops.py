"""FLOPs of levels that learn in context, by the rules of `models.flops`."""

from nl_jax.models import flops
from nl_jax.models.incontext import contract, local_loss


def task(model: contract.Learner, tokens: int) -> float:
  """The inner backward pass of levels that learn from the task loss.

  Through slow kernels one product for each of the forward pass, the gradient
  of its input; through fast ones, attention and memories two. It ends at the
  first fast level, whose input no fast weight is before; and the micro-chunk
  that stays open is not learned from. Replays of `nested_meta="full"` are not
  counted.
  """
  base, chunk = model.base, model.options.chunks[0]
  unit, count = base.unit_flops(tokens), model.fast_layers
  fast = flops.feed_forward(base.cms, base.width, model.fast_levels)
  passed = (count - 1) * (unit.total + unit.attention + unit.memories + fast)
  passed += _first_layer(model)
  if model.options.rule == "dgd":
    passed += 2 * count * fast  # The erase, and its gradient by the kernels.
  closed = (tokens - 1) // chunk * chunk / tokens
  return closed * (passed + 2.0 * base.vocab_size * base.width)


def _first_layer(model: contract.Learner) -> float:
  """The same through the feed-forward part of the first fast layer."""
  config = model.base.cms
  chain = config.variant != "independent"
  total, reached = 0.0, False
  for name in config.levels:
    one = flops.feed_forward(config, model.base.width, (name,))
    learns = name in model.fast_levels
    # 6 D F: to its kernels; 2 D F: through w_down; 4 D F: to its input.
    total += learns * 4 / 3 * one
    if chain and reached:
      total += one * (2 / 3 if learns else 1)
    reached = reached or learns
  return total


def local(model: contract.Learner) -> float:
  """Levels that learn from losses of their layers: memories of one head.

  They read at the key: the feed-forward part has counted that.
  """
  D = model.base.width
  widths = dict(zip(model.base.cms.levels, model.base.cms.widths))
  total = 0.0
  for name, chunk in zip(model.fast_levels, model.options.chunks):
    F = widths[name]
    shapes = {"w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}
    rule = local_loss.rule(model, chunk)
    total += 2.0 * D * D
    total += flops.chunked(shapes, rule, reads=False, anchor=False)
  return model.fast_layers * total
