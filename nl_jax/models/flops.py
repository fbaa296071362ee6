"""FLOPs of a token, by formula: the rules of what MFU counts.

Each mixer counts itself by them, and `model.flops(tokens)` is the sum
(docs/mathematics.md 3.5).

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

from collections.abc import Mapping
from typing import Any, NamedTuple

from nl_jax import memory
from nl_jax.memory import muon
from nl_jax.models import cms

Shapes = Mapping[str, tuple[int, int]]  # (a, b) by layer, the output last.


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
  return 3.0 * model.flops(tokens).total


def add(*parts: Flops) -> Flops:
  """The sum, part by part."""
  return Flops(*(sum(values) for values in zip(*parts)))


def feed_forward(
  config: cms.Options, width: int, levels: tuple[str, ...] | None = None
) -> float:
  """6 D F of each level of the CMS, or of some by name; `width` is D."""
  widths = zip(config.levels, config.widths)
  hidden = sum(F for name, F in widths if levels is None or name in levels)
  return 6.0 * width * hidden


def chunked(
  shapes: Shapes,
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


def layers_of(arch: str, K: int, hidden: int) -> Shapes:
  """Of the memories of `nl_jax.memory`, V = K."""
  if arch == "linear":
    return {"w": (K, K)}
  M = hidden or K
  gate = {"w_gate": (K, M)} if arch == "glu" else {}
  return {"w_in": (K, M), **gate, "w_out": (M, K)}


def product(shapes: Shapes) -> float:
  """One forward pass through the layers."""
  return sum(2.0 * a * b for a, b in shapes.values())


def scores(heads: int, head_dim: int, keys: float) -> float:
  """Queries against keys, and the sum of their values."""
  return 4.0 * keys * heads * head_dim
