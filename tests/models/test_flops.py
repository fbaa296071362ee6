"""FLOPs by formula against the products of the traced program.

Everything that the program makes beyond the formula, or does not make as a
product, is named here and added: what is left is nothing.
"""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory
from nl_jax.aot import hlo
from nl_jax.memory import linear, mlp
from nl_jax.models import flops
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers import mamba

_TINY = [n for n in named.config_names() if n.endswith("_tiny")]
# The gradient of hope_incontext takes half a minute to trace.
TRAINED = [n for n in _TINY if n != "hope_incontext_tiny"]


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
  """FLOPs of all matrix products, loops counted by their trips."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      axes = eqn.params["dimension_numbers"][0][0]
      terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
      total += 2 * terms * math.prod(eqn.outvars[0].aval.shape)
      continue
    if eqn.primitive.name == "product":  # Of `kernels.walk.products`.
      summed = -1 if eqn.params["form"][0] == "n" else -2
      terms = eqn.invars[0].aval.shape[summed]
      total += 2 * terms * math.prod(eqn.outvars[0].aval.shape)
      continue
    inside = [products(x) for x in inner(eqn)]
    assert not inside or eqn.primitive.name != "while"
    one = max if eqn.primitive.name == "cond" and inside else sum
    total += one(inside) * eqn.params.get("length", 1)
  return total


def inner(eqn):
  core = jax.extend.core
  for value in eqn.params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x


@pytest.fixture(autouse=True)
def no_remat(monkeypatch):
  monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)


def model_of(name):
  config = build.resolve(named.load_config(name))
  return build.model(config), config.data.sequence_length


def traced(function, net, tokens):
  """FLOPs of a token of function(params, tokens)."""
  params = jax.eval_shape(net.init, jax.random.key(0))
  row = jax.ShapeDtypeStruct((1, tokens), np.int32)
  return products(jax.make_jaxpr(function)(params, row).jaxpr) / tokens


def beyond(shapes, rule, normed=False, row=False, loop=False):
  """What the chunk form of a memory makes beyond `flops.chunked`."""
  C, W, h = rule.chunk, rule.chunk + rule.omega - 1, rule.omega - 1
  muon, reads = rule.inner_muon == "chunk", rule.read != "chunk_start"
  whole, more = rule.erase_of == "whole", decays(rule)
  if h:  # The newest tokens, by one-hot rows: keys, targets and gates.
    K, V = next(iter(shapes.values()))[0], list(shapes.values())[-1][1]
    more += 2 * h * W * (K + V + 1) / C
  for i, (name, (a, b)) in enumerate(shapes.items()):
    last = i == len(shapes) - 1
    known = not last or normed or rule.objective != "dot"
    erases = memory.rule.erases(rule, name)
    shared = 0 < i and not last
    if not known:
      more += 2 * a * b * W / C  # The prediction, for the metric of the loss.
    if erases:
      more += inverse(C) + C * b  # In place of a solve.
      if known and (rule.retention_target == "zero" or whole):
        more += 2 * a * b  # u W (or u R), known from the inner forward pass.
    if muon:  # Writes of nothing to W.
      more += 2 * a * b + 2 * (a * (not shared) + b) * C * reads
    elif rule.has_momentum:
      more += 2 * C  # Decays of what momentum adds to the state at the end.
    if h:
      # Weights of the writes: in the system, in reads, of the end's W and S.
      more += 2 * C * W * (0 if muon else erases + reads)
      more += 2 * W * (1 if muon else 1 + rule.has_momentum)
      more += 2 * (a + b + C) * W * W / C  # Their sizes, a metric.
      if erases and reads:
        more += 2 * a * C  # q and own u, a part of q and all that is written.
      if shared and not muon:  # Inputs are laid anew for each layer.
        more += 2 * a * (W * (erases + reads) + C * erases)
    if row:
      more += 2 * a * b  # Reads of the anchor, to scale what is above it.
    if loop:
      more -= 2 * a * b  # A write is not a product of matrices.
  return more


def decays(rule):
  """Those of momentum, times those of the states that are asked for."""
  if not rule.has_momentum or rule.inner_muon == "chunk":
    return 0
  states = {"before"} if rule.dgd_scope != "none" else set()
  return 2 * rule.chunk**2 * len(states | {rule.read} - {"chunk_start"})


def inverse(C):
  """Of I + L by blocks, on all of the matrix in each round."""
  return 4 * C * C * (math.log2(C) - 1)


def of_mixer(net, tokens):
  """What one unit of the stack makes beyond the formula."""
  options, H, K = net.mixer, net.heads, net.head_dim
  past = lambda window: 4 * H * K * (window - 1)  # Spans of two windows.
  match net.arch:
    case "transformer" | "hope_attention":
      window = options.window if options else 0
      return past(window) if 0 < window < tokens else 0
    case "samba":
      writes = 2 * mamba.EXPAND * net.width * options.state_dim
      return past(options.window) - writes
    case "retnet":
      return H * beyond({"w": (K, 2 * K)}, options.rule)
    case "rwkv7":  # The first layer has zeros for a LoRA of values.
      lora = 4 * net.width * options.value_rank / net.layers
      running = 2 * options.chunk * K  # Sums of log decays.
      return lora + H * (inverse(options.chunk) + options.chunk * K + running)
    case "gated_deltanet2":
      more = 2 * K + options.value_dim  # Sums of log decays, and the solve.
      return H * (inverse(options.chunk) + options.chunk * more)
    case "deltanet" | "gated_deltanet" | "comba":
      shape = (K, options.value_dim or K)
      return H * beyond({"w": shape}, options.rule)
    case "ttt_linear":
      return H * beyond({"w": (K + 1, K)}, options.rule, True, True)
    case "ttt_mlp":
      shapes = {"w_in": (K + 1, 4 * K), "w_out": (4 * K + 1, K)}
      return H * beyond(shapes, options.rule, True, True)
    case "hope":
      return H * of_hope(options, K)
  shapes = {"w_in": (K, options.hidden), "w_out": (options.hidden, K)}
  more = H * beyond(shapes, options, loop=net.arch == "memora")
  if net.arch in ("titans_mag", "titans_mal"):
    more += past(options.window)
  if net.arch == "titans_mac":  # Keys of persistent tokens in each segment.
    each = 4 * net.width**2 * options.persistent
    more += each / options.segment - each / tokens
  return more


def of_hope(options, K):
  """Roles stand side by side: one system of all layers fed with the key."""
  roles = len(options.generator_roles)
  made, own = options.generator_rule, options.memory_rule
  shapes = flops.layers_of(options.memory, K, options.hidden)
  normed = options.memory == "mlp_ln"
  more = roles * beyond(shapes, made, normed) + beyond(shapes, own, normed)
  fed = [name for name in shapes if name in memory.rule.INPUT_LAYERS]
  others = max(roles - 1, 0)
  for name in fed:
    once = inverse(made.chunk) * memory.rule.erases(made, name)
    once += 2 * made.chunk * made.has_momentum
    more -= others * once
  more -= others * decays(made)
  if roles and made.chunk == own.chunk:  # One walk: those of M_memory do.
    more -= decays(made)
  if options.gate_source == "memory":
    more -= 4 * K  # Gates of a head are sums over lanes, no products.
  return more


def in_context(net, tokens):
  """The same of a model whose levels learn in context.

  Mixers after a fast level run in micro-chunks. These are calls of their own,
  which lay their tokens on the memories' grid: a chunk more.
  """
  base, chunk, options = net.base, net.options.chunks[0], net.base.mixer
  own, behind = of_mixer(base, tokens), net.fast_layers - 1
  closed = (tokens - 1) // chunk * chunk / tokens
  if base.arch == "hope_attention":
    span = min(chunk, options.window) + options.window - 1
    more = span - min(options.window, tokens)
    more *= 4 * base.heads * base.head_dim * (1 + 2 * closed)
  else:
    C = options.chunk_memory
    walked = base.flops(tokens).memories / base.units
    calls = (-(-(chunk + C - 1) // C)) * C / chunk
    more = calls * (walked + own) - walked
    once = calls * (walked + own) - base.heads * calls * simpler(base)
    more += 2 * closed * (once - walked)
  more = (base.units - behind) * own + behind * more
  if net.options.rule == "dgd":  # Sums over tokens, one a kernel.
    more += closed * 6 * net.fast_layers * len(net.fast_levels)
  return more


def simpler(base):
  """Half of what a gradient through a head spares, against two for each."""
  K, M, C = base.head_dim, base.mixer.hidden, base.mixer.chunk_memory
  # A system that is solved has the derivative of a product; w_in of the
  # generators shares one.
  more = (len(base.mixer.generator_roles) + 1 + 2) * inverse(C)
  # Learned starts are constant to the inner loss.
  return more + 2 * K * M


def check_forward(net, tokens):
  """(FLOPs of a token, found to be the formula's; the sum of all logits)."""
  loss = lambda p, x: jnp.sum(net.apply(p, x)[0])
  counted, wanted = traced(loss, net, tokens), net.flops(tokens).total
  if isinstance(net, incontext.InContextModel):
    wanted += in_context(net, tokens)
  else:
    wanted += net.units * of_mixer(net, tokens)
  assert counted == pytest.approx(wanted, rel=1e-12)
  return counted, loss


# At the other size: those that are trained, below.
@pytest.mark.parametrize("name", [*_TINY, "hope_incontext_tiny:smoke"])
def test_forward_is_the_products_of_the_program(name):
  check_forward(*model_of(name))


@pytest.mark.parametrize("name,change", [
  ("hope_attention_incontext_tiny", dict(fast_layers=2)),
  ("hope_attention_incontext_tiny", dict(fast_levels=("mid", "low"))),
  ("hope_attention_incontext_tiny", dict(variant="independent")),
  ("hope_attention_incontext_tiny", dict(fast_layers=2, rule="dgd")),
  ("hope_incontext_tiny", dict(
    fast_layers=2, fast_levels=("high",), chunks=(8,), rates=(0.1,))),
])  # fmt: skip
def test_other_ways_to_learn_in_context(name, change):
  config = named.load_config(f"{name}:smoke")
  config.model.cms.update(change)
  config = build.resolve(config)
  net, tokens = build.model(config), config.data.sequence_length
  counted = traced(lambda p, x: net.apply(p, x)[0], net, tokens)
  wanted = net.flops(tokens).total + in_context(net, tokens)
  assert counted == pytest.approx(wanted, rel=1e-12)


def test_the_compiled_program_of_attention_makes_just_that():
  net, tokens = model_of("transformer_tiny:smoke")
  params = jax.eval_shape(net.init, jax.random.key(0))
  row = jax.ShapeDtypeStruct((1, tokens), np.int32)
  run = jax.jit(lambda p, x: net.apply(p, x)[0])
  text = run.lower(params, row).compile().as_text()
  wanted = tokens * net.flops(tokens).total
  assert hlo.count(text, {}).flops == wanted


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_at_most_three_times_the_forward_pass(name):
  """Less where a factor is not a parameter, as the learned metric of `dot`."""
  net, tokens = model_of(name + ":smoke")
  forward, loss = check_forward(net, tokens)
  assert 2.8 < traced(jax.grad(loss), net, tokens) / forward <= 3
  assert flops.training(net, tokens) == 3 * net.flops(tokens).total


@pytest.mark.parametrize("name", named.config_names())
def test_every_config_has_a_formula(name):
  net, tokens = model_of(name)
  parts = net.flops(tokens)
  assert min(parts) >= 0 and parts.output > 0 and parts.feed_forward > 0
  # Two for each parameter that is read, and more where tokens meet.
  assert parts.total > 1.9 * net.parameter_count()


# Of the sums that docs/mathematics.md 3.5 states, V = K; but without momentum
# error and erase are one row: 4 C (K + M) less, and 2 C (K + M) where nothing
# is read.
K, M, C = 64, 128, 16


@pytest.mark.parametrize("change,wanted", [
  ({}, 14 * K * M + C * (7 * K + 7 * M)),
  (dict(dgd_scope="none"), 14 * K * M + C * (4 * K + 4 * M)),
  (dict(momentum="ema"), 26 * K * M + C * (11 * K + 11 * M)),
])  # fmt: skip
def test_a_memory_is_that_of_the_specification(change, wanted):
  rule = memory.Rule(chunk=C, retention_target="zero", erase_of="whole",
                     **change)  # fmt: skip
  assert flops.chunked({"w_in": (K, M), "w_out": (M, K)}, rule) == wanted


@pytest.mark.parametrize("momentum,more", [
  ("off", 0), ("sum", 8 * K * M + C * (2 * K + 2 * M)),
])  # fmt: skip
def test_a_generator_is_that_of_the_specification(momentum, more):
  rule = memory.Rule(chunk=C, retention_target="zero", erase_of="whole",
                     read="chunk_start", momentum=momentum)  # fmt: skip
  made = flops.chunked({"w_in": (K, M), "w_out": (M, K)}, rule)
  target = 4 * K * M  # Made by itself.
  assert made + target == 18 * K * M + C * (3 * K + 3 * M) + more


RULES = {
  "delta": ("linear", dict(objective="dot", dgd_coef="raw")),
  "zero": ("mlp", dict(retention_target="zero", erase_of="whole")),
  "before": ("mlp", dict(read="before")),
  "momentum": ("mlp", dict(momentum="ema")),
  "normed": ("mlp_ln", dict(dgd_scope="none", read="chunk_start")),
  "gated": ("glu", dict(dgd_scope="none", momentum="sum")),
  "muon": ("mlp", dict(dgd_scope="none", momentum="ema", inner_muon="chunk")),
  "window": ("mlp", dict(dgd_scope="none", omega=3)),
  "erasing": ("glu", dict(objective="dot", omega=3)),
}


@pytest.mark.parametrize("arch,change", RULES.values(), ids=RULES)
def test_other_rules_of_a_memory(arch, change):
  rule, H, hidden, T = memory.Rule(chunk=8, **change), 2, 24, 32
  if arch == "linear":
    params, run = linear.init(jax.random.key(0), H, 16, 16), linear.update
  else:
    params = mlp.init(jax.random.key(0), H, 16, hidden, arch=arch)
    run = functools.partial(mlp.update, arch=arch)
  z = jax.ShapeDtypeStruct((1, T, H, 16), np.float32)
  gate = jax.ShapeDtypeStruct((1, T, H), np.float32)

  def read(q, k, v, *gates):
    state = memory.chunked.start(params, 1, rule)
    gates = memory.Gates(*gates)
    return run(params, state, q, k, v, gates, rule=rule, at_edge=True)[0]

  gates = (gate,) * (2 + rule.has_momentum)
  if rule.omega > 1:
    gates = (gate, gate, None, gate)
  counted = products(jax.make_jaxpr(read)(z, z, z, *gates).jaxpr) / (T * H)
  shapes = flops.layers_of(arch, 16, hidden)
  normed = arch == "mlp_ln"
  wanted = flops.chunked(shapes, rule, normed=normed)
  assert counted == wanted + beyond(shapes, rule, normed)


@pytest.mark.parametrize("loss", ["local_l2", "local_dot"])
def test_levels_that_learn_from_losses_of_their_layers(loss):
  config = named.load_config("hope_attention_incontext_tiny:smoke")
  config.model.cms.inner_loss = loss
  config.model.cms.reset = "document"
  config = build.resolve(config)
  net, tokens = build.model(config), config.data.sequence_length
  counted = traced(lambda p, x: net.apply(p, x)[0], net, tokens)
  wanted = net.flops(tokens).total
  wanted += net.base.units * of_mixer(net.base, tokens)
  # The forward pass at the key is also the read, and made twice.
  fast = sum(net.base.cms.widths[:2]) * net.fast_layers
  assert counted == wanted + 6 * net.base.width * fast
