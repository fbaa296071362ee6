"""FLOPs of a token, by formula: what MFU counts (docs/mathematics.md 3.5).

Products of matrices in the forward pass, a multiply-add as 2, means over the
tokens of a sequence from its start. Counted is what the mathematics asks for in
its chunk form (docs/mathematics.md 2.5), the learning of memories and of levels
in context included, whatever an implementation does:

- attention sees all T keys, or all W of a window, as is usual: the causal half
  is not taken off;
- the solve of the erase is C b, not the inverse by blocks that replaces it;
- without momentum and window a token erases at the rate at which it writes: its
  error and what it erases are one row, solved for and applied once;
- what is made twice counts once, and so do products of keys with keys, and of
  queries with keys, for all layers and memories that are fed with these.

Not counted: norms, convolutions, softmax, gates, products of decays alone, and
what a backward pass recomputes.

Training counts as three times the forward pass, by convention: of every product
of the forward pass, the steps of inner learning included, two more follow, one
for each factor.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nl_jax import memory
from nl_jax.memory import muon, self_modifying
from nl_jax.models import lm
from nl_jax.models.incontext import local_loss
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers import mamba
from nl_jax.models.mixers.attention import mixer as attention

_Shapes = Mapping[str, tuple[int, int]]  # (a, b) by layer, the output last.


class Flops(NamedTuple):
  """FLOPs of a token in the forward pass, by part.

  Attributes:
    projections: slow kernels of the mixers.
    attention: scores and sums of values.
    memories: reads and writes of token memories, their inner gradients.
    feed_forward: all levels of the CMS.
    in_context: inner gradients of levels that learn in context.
    output: logits.
  """

  projections: float = 0.0
  attention: float = 0.0
  memories: float = 0.0
  feed_forward: float = 0.0
  in_context: float = 0.0
  output: float = 0.0

  @property
  def total(self) -> float:
    """Of all parts."""
    return sum(self)


def training(model: Any, tokens: int) -> float:
  """FLOPs of a token in a training step: 3 x forward.

  Args:
    model: `lm.LanguageModel` or `incontext.InContextModel`.
    tokens: T, of a sequence.
  """
  return 3.0 * forward(model, tokens).total


def forward(model: Any, tokens: int) -> Flops:
  """FLOPs of a token in the forward pass.

  Args:
    model: `lm.LanguageModel` or `incontext.InContextModel`.
    tokens: T, of a sequence.
  """
  if isinstance(model, incontext.InContextModel):
    more = _local(model) if model.local else _task(model, tokens)
    return forward(model.base, tokens)._replace(in_context=more)
  unit = _unit(model, tokens)
  whole = Flops(*(model.units * part for part in unit))
  return whole._replace(output=2.0 * model.vocab_size * model.width)


def _unit(model: lm.LanguageModel, tokens: int) -> Flops:
  """One layer, or what the stack has in place of one."""
  mixer = MIXERS[model.arch](model, tokens)
  if model.whole:
    return mixer
  return _add(mixer, Flops(feed_forward=_feed_forward(model)))


def _add(*parts: Flops) -> Flops:
  return Flops(*(sum(values) for values in zip(*parts)))


def _feed_forward(
  model: lm.LanguageModel, levels: tuple[str, ...] | None = None
) -> float:
  """6 D F of each level, or of some by name."""
  widths = zip(model.cms.levels, model.cms.widths)
  hidden = sum(F for name, F in widths if levels is None or name in levels)
  return 6.0 * model.width * hidden


def chunked(
  shapes: _Shapes,
  rule: memory.Rule,
  *,
  reads: bool = True,
  anchor: bool = True,
  normed: bool = False,
  loop: bool = False,
) -> float:
  """Of a token and head: a memory is read, and learns.

  The layers are W (a, b), all but the last fed with the key. For an MLP
  with V = K, DGD per layer and retention to zero: 14 K M + C (7 K + 7 M), and
  with momentum 26 K M + C (11 K + 11 M).

  Args:
    shapes: of the layers.
    rule: how it learns.
    reads: False: it only learns.
    anchor: False: the forward pass at the key is counted elsewhere.
    normed: a norm stands after the last layer.
    loop: the rule runs token by token, and knows no chunk.
  """
  total = 0.0
  for i, (name, (a, b)) in enumerate(shapes.items()):
    last = i == len(shapes) - 1
    erases = rule.dgd_scope == "per_layer" or (
      rule.dgd_scope == "input_layer" and name in memory.rule.INPUT_LAYERS
    )
    # The error of `dot` is the target: it asks for no prediction.
    known = not last or normed or rule.objective != "dot"
    gradient = (known and anchor) + (last and i > 0)
    shared = i > 0 and not last
    total += _layer(a, b, rule, erases, known, gradient, shared, reads, loop)
  return total


def _layer(
  a: int,
  b: int,
  rule: memory.Rule,
  erases: bool,
  known: bool,
  gradient: int,
  shared: bool,
  reads: bool,
  loop: bool,
) -> float:
  """Of one layer W (a, b), as `chunked`.

  Args:
    a, b: its shape.
    rule: how it learns.
    erases: it forgets what stands at its input.
    known: u W is known at the anchor, from the inner forward pass.
    gradient: products with W for the inner gradient.
    shared: its inputs are those of a layer before it, and met there.
    reads, loop: as `chunked`.
  """
  C, kept = rule.chunk, rule.retention_target == "init"
  written = C + rule.omega - 1  # Gradients that a chunk writes.
  S = rule.has_momentum
  # Products of a row with a matrix (a, b): W, its start, its momentum.
  rows = gradient * written / C + written / C + S * written / C
  across = 0.0  # Products between the tokens of a chunk, of a each or b.
  met = 0 if shared else a
  # One rate for error and erase: they are one row, known by the solve.
  apart = erases and (S or rule.omega > 1)
  if erases:
    whole = kept and rule.erase_of == "whole"
    reused = known and not loop and (whole or not kept)
    rows += 1 + whole - reused + S + (rule.omega > 1)
    across += 2 * met * C + 2 * b * written * apart + b * C
    across += 2 * met * written * (rule.omega > 1)
  if reads and rule.read == "chunk_start":
    rows += 1
  elif reads:
    rows += 1 + kept + S
    across += 2 * (met + b) * written + 2 * b * C * apart
  if rule.inner_muon == "chunk":  # W stands still while its momentum moves.
    read = 1 + (kept and rule.read != "chunk_start")
    rows = (gradient + 1) * written / C + reads * read
    across = 0.0
  total = 2.0 * a * b * rows + (0.0 if loop else across)
  if rule.inner_muon != "off":
    short, steps = min(a, b), len(muon.COEFFICIENTS)
    one = steps * (4.0 * short * a * b + 2.0 * short**3)
    total += one / (C if rule.inner_muon == "chunk" else 1)
  return total


def layers_of(arch: str, K: int, hidden: int) -> _Shapes:
  """Of the memories of `nl_jax.memory`, V = K."""
  if arch == "linear":
    return {"w": (K, K)}
  M = hidden or K
  gate = {"w_gate": (K, M)} if arch == "glu" else {}
  return {"w_in": (K, M), **gate, "w_out": (M, K)}


def _product(shapes: _Shapes) -> float:
  """One forward pass through the layers."""
  return sum(2.0 * a * b for a, b in shapes.values())


def _scores(model: lm.LanguageModel, keys: float) -> float:
  """Queries against keys, and the sum of their values."""
  return 4.0 * keys * model.heads * model.head_dim


def _attention(model: lm.LanguageModel, tokens: int) -> Flops:
  options = attention.options(model)
  both = model.heads + (options.kv_heads or model.heads)
  keys = min(options.window or tokens, tokens)
  return Flops(
    projections=4.0 * model.width * model.head_dim * both,
    attention=_scores(model, keys),
  )


def _retnet(model: lm.LanguageModel, tokens: int) -> Flops:
  del tokens
  K = model.head_dim
  one = chunked({"w": (K, 2 * K)}, model.mixer.rule)
  return Flops(projections=16.0 * model.width**2, memories=model.heads * one)


def _delta(model: lm.LanguageModel, tokens: int) -> Flops:
  """DeltaNet, Gated DeltaNet and Comba."""
  del tokens
  H, K, options = model.heads, model.head_dim, model.mixer
  V = options.value_dim or K
  gates = 1 + (model.arch != "deltanet")
  columns = H * (2 * K + V * (2 + options.output_gate) + gates)
  return Flops(
    projections=2.0 * model.width * columns,
    memories=H * chunked({"w": (K, V)}, options.rule),
  )


def _rwkv(model: lm.LanguageModel, tokens: int) -> Flops:
  """A whole layer; what is erased stands at another key than what is written.

  Keys against keys four times, one solve, and two writes for each read.
  """
  del tokens
  options, D, K = model.mixer, model.width, model.head_dim
  ranks = options.decay_rank + options.rate_rank + options.gate_rank
  ranks += options.value_rank * (1 - 1 / model.layers)  # Not in the first.
  one = 8.0 * K * K + 15.0 * K * options.chunk
  return Flops(
    projections=8.0 * D * D + 4.0 * D * ranks,
    memories=model.heads * one,
    feed_forward=4.0 * D * model.cms.widths[0],
  )


def _samba(model: lm.LanguageModel, tokens: int) -> Flops:
  """Mamba, its feed-forward part, and attention to a window."""
  D, N = model.width, model.mixer.state_dim
  inner, R = mamba.EXPAND * D, mamba.rank(D)
  # A memory of N numbers a channel: u v is written, and read.
  even = Flops(
    projections=2.0 * inner * (3 * D + 2 * R + 2 * N),
    memories=4.0 * inner * N,
    feed_forward=_feed_forward(model),
  )
  odd = Flops(
    projections=8.0 * D * D,
    attention=_scores(model, min(model.mixer.window, tokens)),
  )
  return _add(even, odd)


def _ttt(model: lm.LanguageModel, tokens: int) -> Flops:
  """Biases are one more input of each layer."""
  del tokens
  D, H, K = model.width, model.heads, model.head_dim
  shapes = {"w": (K + 1, K)}
  if model.arch == "ttt_mlp":
    M = model.mixer.hidden or 4 * K
    shapes = {"w_in": (K + 1, M), "w_out": (M + 1, K)}
  return Flops(
    projections=8.0 * D * D + 2.0 * D * H,
    memories=H * chunked(shapes, model.mixer.rule, normed=True),
  )


def _titans(model: lm.LanguageModel, tokens: int) -> Flops:
  del tokens
  options, D, H = model.mixer, model.width, model.heads
  gates = len(options.gates) + (options.omega > 1)
  return Flops(
    projections=10.0 * D * D + 2.0 * D * H * gates,
    memories=H * _of_titans(model),
  )


def _memora(model: lm.LanguageModel, tokens: int) -> Flops:
  """The layer of Titans, but for gates of a channel through `rank`."""
  del tokens
  D, rank = model.width, model.mixer.rank
  return Flops(
    projections=10.0 * D * D + 8.0 * D * rank,
    memories=model.heads * _of_titans(model),
  )


def _of_titans(model: lm.LanguageModel) -> float:
  options, K = model.mixer, model.head_dim
  shapes = layers_of(options.memory, K, options.hidden)
  normed = options.memory == "mlp_ln"
  total = chunked(shapes, options, normed=normed, loop=options.loops)
  if options.span:
    wide = memory.spans.wide_rule(options, options.span)
    total += chunked(shapes, wide, normed=normed)
    total += chunked({"w": (K, K)}, memory.spans.keys_rule(options))
  return total


def _beside(model: lm.LanguageModel, tokens: int) -> Flops:
  """Titans with attention to a window and to the persistent tokens."""
  options, D = model.mixer, model.width
  keys = min(options.window, tokens) + options.persistent
  own = Flops(
    projections=8.0 * D * D + 4.0 * D * D * options.persistent / tokens,
    attention=_scores(model, keys),
  )
  return _add(own, _titans(model, tokens))


def _context(model: lm.LanguageModel, tokens: int) -> Flops:
  """Titans whose attention also sees what each token recalls."""
  options, D = model.mixer, model.width
  keys = 2 * min(options.segment, tokens) + options.persistent
  recall = _product(layers_of(options.memory, model.head_dim, options.hidden))
  own = Flops(
    # W_q of the recall, keys and values of tokens and of what they recall.
    projections=14.0 * D * D + 4.0 * D * D * options.persistent / tokens,
    attention=_scores(model, keys),
    memories=model.heads * recall,
  )
  return _add(own, _titans(model, tokens))


def _hope(model: lm.LanguageModel, tokens: int) -> Flops:
  """Self-modifying Titans: the generators, then M_memory."""
  del tokens
  config: self_modifying.Config = model.mixer
  D, H, K = model.width, model.heads, model.head_dim
  shapes = layers_of(config.memory, K, config.hidden)
  how = dict(
    normed=config.memory == "mlp_ln", loop=config.gate_shape == "channel"
  )
  own = lambda part: (part.value_source == "self") * _product(shapes)
  made = chunked(shapes, config.generator_rule, **how) + own(config.generators)
  one = chunked(shapes, config.memory_rule, **how) + own(config)
  roles = len(config.generator_roles)
  one += roles * made
  if roles and config.dgd_scope != "none" and not how["loop"]:
    # Keys against keys: once for all that have the same chunks.
    with_memory = config.chunk_gen == config.chunk_memory
    one -= (roles - 1 + with_memory) * 2.0 * K * config.chunk_gen
  projected = 1 if config.gen_input == "slice" else 3
  projections = 2.0 * D * H * K * (projected + 2)
  if config.gate_source == "static":
    projections += 4.0 * D * H
  elif config.gate_shape == "head":
    one += 4.0 * K
  return Flops(projections=projections, memories=H * one)


# By model.arch: (model, tokens of a sequence) -> Flops of a unit of the stack.
MIXERS: dict[str, Callable[[lm.LanguageModel, int], Flops]] = {
  "comba": _delta,
  "deltanet": _delta,
  "dla": _titans,
  "gated_deltanet": _delta,
  "hope": _hope,
  "hope_attention": _attention,
  "memora": _memora,
  "retnet": _retnet,
  "rwkv7": _rwkv,
  "samba": _samba,
  "titans_lmm": _titans,
  "titans_mac": _context,
  "titans_mag": _beside,
  "titans_mal": _beside,
  "transformer": _attention,
  "ttt_linear": _ttt,
  "ttt_mlp": _ttt,
}


def _task(model: incontext.InContextModel, tokens: int) -> float:
  """The inner backward pass of levels that learn from the task loss.

  Through slow kernels one product for each of the forward pass, the gradient
  of its input; through fast ones, attention and memories two. It ends at the
  first fast level, whose input no fast weight is before; and the micro-chunk
  that stays open is not learned from. Replays of `nested_meta="full"` are not
  counted.
  """
  base, chunk = model.base, model.options.chunks[0]
  unit, count = _unit(base, tokens), model.fast_layers
  fast = _feed_forward(base, model.fast_levels)
  passed = (count - 1) * (unit.total + unit.attention + unit.memories + fast)
  passed += _first_layer(model)
  if model.options.rule == "dgd":
    passed += 2 * count * fast  # The erase, and its gradient by the kernels.
  closed = (tokens - 1) // chunk * chunk / tokens
  return closed * (passed + 2.0 * base.vocab_size * base.width)


def _first_layer(model: incontext.InContextModel) -> float:
  """The same through the feed-forward part of the first fast layer."""
  chain = model.base.cms.variant != "independent"
  total, reached = 0.0, False
  for name in model.base.cms.levels:
    one, learns = _feed_forward(model.base, (name,)), name in model.fast_levels
    # 6 D F: to its kernels; 2 D F: through w_down; 4 D F: to its input.
    total += learns * 4 / 3 * one
    if chain and reached:
      total += one * (2 / 3 if learns else 1)
    reached = reached or learns
  return total


def _local(model: incontext.InContextModel) -> float:
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
    total += 2.0 * D * D + chunked(shapes, rule, reads=False, anchor=False)
  return model.fast_layers * total
