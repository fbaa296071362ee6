"""Titans with attention (MAG, MAL, MAC) against loops over tokens.

The loops share no code with the library: the memory's is `tests.memory.oracle`,
attention is written out query by query.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, card, sharding
from nl_jax.models import cms, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.titans import (
  hybrid as titans_hybrid,
)
from nl_jax.models.mixers.titans import (
  lmm as titans,
)
from nl_jax.models.mixers.titans import (
  mac as titans_mac,
)
from nl_jax.models.mixers.titans import (
  mag as titans_mag,
)
from nl_jax.models.mixers.titans import (
  mal as titans_mal,
)
from nl_jax.train import optimizer
from tests.laws.models import MODELS
from tests.memory import oracle
from tests.models import test_titans

MODULES = {
  "titans_mag": titans_mag, "titans_mal": titans_mal, "titans_mac": titans_mac,
}  # fmt: skip
W, S, C = 4, 8, 4
draw, close = test_titans.draw, test_titans.close


@functools.cache
def small(arch, depth=1, **change):
  reach = {"segment": S} if arch == "titans_mac" else {"window": W}
  options = dict(chunk=C, hidden=6, residual_clip=0.0, persistent=3)
  return lm.LanguageModel(
    arch, width=8, layers=depth, heads=2, head_dim=4, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=MODULES[arch].Options(**options | reach | change),
  )  # fmt: skip


def generic(model):
  """Float64 parameters of one layer, none of them at a special value."""
  return test_titans.generic(
    leaf.drawn(model.module.leaves(model), jax.random.key(0))
  )


@functools.cache
def mixer(model):
  """The compiled layer: outputs and state, from a state or the start."""
  return jax.jit(
    lambda p, x, state=None, ids=None: model.module.apply(
      p, x, state, ids, model=model
    )[:2]
  )


def norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


GATES = {"sigmoid": sigmoid, "silu": silu, "linear": lambda x: x}


class Taps:
  """The last inputs of a short convolution."""

  def __init__(self, kernel, taps):
    self.kernel, self.taps, self.seen = kernel, taps, []

  def __call__(self, x):
    self.seen = [*self.seen, x @ self.kernel]
    return silu(sum(self.taps[3 - i] * y
                    for i, y in enumerate(self.seen[::-1][:4])))  # fmt: skip


class LongTerm:
  """The memory branch, a token at a time."""

  def __init__(self, model, p):
    self.model, self.p = model, p
    H = model.heads
    heads = [jax.tree.map(lambda w, h=h: w[h], p["memory"]) for h in range(H)]
    self.clocks = [oracle.Clock(w, model.mixer.chunk) for w in heads]
    self.restart()

  def restart(self):
    p = self.p
    self.convs = {n: Taps(p[f"w_{n}"], p[f"conv_{n}"]) for n in "qkv"}
    self.recall = Taps(p["w_q"], p["conv_q"])
    for clock in self.clocks:
      clock.restart()

  def tick(self):
    for clock in self.clocks:
      clock.tick()

  def look(self, weights, q):
    """RMSNorm(M(q)) of every head; weights: one set a head."""
    reads = [
      np.asarray(oracle.forward("mlp", True, w, oracle.l2(x)))
      for w, x in zip(weights, q.reshape(self.model.heads, -1))
    ]
    return norm(np.stack(reads), self.p["norm"]["scale"]).reshape(-1)

  def step(self, x):
    """Learns a token, and reads at it."""
    H, options, gate = self.model.heads, self.model.mixer, self.p["gate"]
    z = {n: conv(x).reshape(H, -1) for n, conv in self.convs.items()}
    eta, alpha, beta = (
      sigmoid(x @ gate[f"w_{n}"] + gate[f"b_{n}"])
      for n in ("eta", "alpha", "beta")
    )
    for h, clock in enumerate(self.clocks):
      clock.W, clock.S = write(options)(
        clock.anchor, clock.W, clock.S, clock.start, oracle.l2(z["k"][h]),
        z["v"][h], options.eta_max * eta[h], alpha[h], beta[h],
      )  # fmt: skip
    y = self.look([clock.W for clock in self.clocks], z["q"])
    return (y * silu(x @ self.p["w_g"])) @ self.p["w_o"]


@functools.cache
def write(options):
  return jax.jit(functools.partial(oracle.write, "mlp", True, options))


def turned(x, position):
  """RoPE of all heads at a position."""
  a, b = np.split(x, 2, axis=-1)
  angle = position * 10000.0 ** (-np.arange(a.shape[-1]) / a.shape[-1])
  c, s = np.cos(angle), np.sin(angle)
  return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def attend(model, p, x, position, past):
  """One query; past: pairs of a position and what stands there."""
  kernels, H = p["attention"], model.heads
  split = lambda x, n: (x @ kernels[f"w_{n}"]).reshape(H, -1)
  q = turned(split(x, "q"), position)
  k = np.stack([turned(split(z, "k"), at) for at, z in past])
  v = np.stack([split(z, "v") for _, z in past])
  logit = np.einsum("hk,shk->sh", q, k) * model.head_dim**-0.5
  weights = np.exp(logit - logit.max(0))
  y = np.einsum("sh,shk->hk", weights / weights.sum(0), v)
  return y.reshape(-1) @ kernels["w_o"]


def persistent(p, first):
  """Positions and tokens, the last before `first`."""
  tokens = p["persistent"]
  return [(first - len(tokens) + j, x) for j, x in enumerate(tokens)]


def loop(model, params, x_TxD, ids):
  """Outputs of one row, one token after the other; 0 is padding."""
  p = jax.tree.map(np.asarray, params)
  far = LongTerm(model, p["lmm"])
  inner = {n: p.get(f"{n}_norm", {}).get("scale") for n in ("attention", "lmm")}
  gate = GATES[getattr(model.mixer, "mag_gate", "linear")]
  out, past, recalled, document, start = [], [], [], 0, None
  for t, x in enumerate(np.asarray(x_TxD)):
    if ids[t] not in (0, document):
      document, past, recalled = ids[t], [], []
      far.restart()
      start = [clock.W for clock in far.clocks]
    if model.arch == "titans_mac" and t % S == 0:
      past, recalled = [], []
      start = [clock.W for clock in far.clocks]
    if ids[t] == 0:
      out.append(None)
    elif model.arch == "titans_mac":
      at = t % S
      past.append((at, x))
      recalled.append((at - S, far.look(start, far.recall(x))))
      seen = persistent(p, -S) + recalled + past
      y = norm(attend(model, p, x, at, seen), inner["attention"])
      out.append(y * gate(norm(far.step(y), inner["lmm"])))
    else:
      z = far.step(x)
      if model.arch == "titans_mal":
        x = norm(z, inner["lmm"])
      past.append((len(past), x))
      seen = persistent(p, 0) + past[-W:]
      y = attend(model, p, x, len(past) - 1, seen)
      if model.arch == "titans_mag":
        y = norm(y, inner["attention"]) * gate(norm(z, inner["lmm"]))
      out.append(y)
    far.tick()
  return out


def check_rows(made, expected):
  real = [t for t, y in enumerate(expected) if y is not None]
  close(np.asarray(made)[real], np.stack([expected[t] for t in real]), 1e-9)


@pytest.mark.parametrize("arch,change", [
  ("titans_mag", {}), ("titans_mag", {"mag_gate": "linear"}),
  ("titans_mal", {}), ("titans_mac", {"mag_gate": "silu"}),
])  # fmt: skip
def test_a_layer_is_its_token_loop(arch, change):
  """Two sections, four chunks and a bit, with one document for all of it."""
  model = small(arch, **change)
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 19, model.width)
    y, _ = mixer(model)(params, x)
    check_rows(y[0], loop(model, params, x[0], np.ones(19, int)))


@pytest.mark.parametrize("arch", MODULES)
def test_documents_anywhere_are_a_token_loop(arch):
  """From a state, documents begin inside chunks, sections and windows."""
  model = small(arch)
  ids = np.array([4] * 5 + [7] * 8 + [0] + [5] * 4, np.int32)
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 18, model.width)
    expected = loop(model, params, x[0], ids)
    start = model.module.init_state(params, 1, 0, model=model)
    y, end = mixer(model)(params, x, start, ids[None])
    check_rows(y[0], expected)
    state, parts = start, []
    for a, b in ((0, 6), (6, 12), (12, 18)):
      y, state = mixer(model)(params, x[:, a:b], state, ids[None, a:b])
      parts.append(y[0])
    check_rows(np.concatenate(parts), expected)
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
  jax.tree.map(same, state, end)


@pytest.mark.parametrize("arch", MODULES)
def test_a_row_that_ended_keeps_its_gradient_point(arch):
  """The state after trailing padding, from the start and from a state."""
  model = small(arch)
  ids = (np.arange(16) < 6).astype(np.int32)[None]
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 16, model.width)
    start = model.module.init_state(params, 1, 0, model=model)
    _, fresh = mixer(model)(params, x, None, ids)
    _, later = mixer(model)(params, x, start, ids)
    _, after = mixer(model)(params, x, later, 0 * ids)
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
  jax.tree.map(same, fresh, later)
  jax.tree.map(same, after, later)


def test_without_persistent_tokens_the_window_is_attention():
  """Limit: `attention` with a window, packed and from call to call."""
  model = small("titans_mag", persistent=0)
  other = dataclasses.replace(
    model, arch="transformer", mixer=attention.Options(window=W)
  )
  near = jax.jit(lambda *args: titans_hybrid.window(*args, model=model))
  plain = jax.jit(
    lambda p, x, state, ids: attention.apply(p, x, state, ids, model=other)[:2]
  )
  ids = [[1] * 5 + [2] * 8 + [0], [0] + [1] * 11 + [0] * 2]
  ids = np.array(ids, np.int32)
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 14, model.width)
    assert "persistent" not in params
    state = expected_state = None
    for a, b in ((0, 9), (9, 14)):
      part = x[:, a:b], ids[:, a:b]
      y, state = near(params, part[0], state, part[1])
      expected, expected_state = plain(
        params["attention"], part[0], expected_state, part[1]
      )
      close(y, expected, 1e-12)


@pytest.mark.parametrize("arch", MODULES)
def test_persistent_tokens_are_seen_from_everywhere(arch):
  model = small(arch)
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 19, model.width)
    moved = params | {"persistent": params["persistent"] + 1.0}
    y, z = (np.asarray(mixer(model)(p, x)[0][0]) for p in (params, moved))
  assert (y != z).any(axis=-1).all()


def test_beyond_a_section_only_the_memory_reaches():
  """It neither learns nor forgets by content: attention and four taps."""
  model = small("titans_mac")
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 19, model.width)
    moved = x.at[:, 0].add(1.0)
    frozen = jax.tree.map(lambda w: w, params)
    gate = params["lmm"]["gate"]
    frozen["lmm"]["gate"] |= {
      "b_eta": gate["b_eta"] - 1e4, "w_alpha": 0 * gate["w_alpha"],
    }  # fmt: skip

    def reach(p):
      y, z = (np.asarray(mixer(model)(p, row)[0][0]) for row in (x, moved))
      return (y != z).any(axis=-1)

    assert reach(params).all()
    changed = reach(frozen)
  assert changed[:S].all() and not changed[S + 3 :].any()


def test_nothing_leaks_from_later_tokens_of_a_section():
  """MAC's traps: recall and second read, by every output's gradient."""
  model = small("titans_mac")
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 11, model.width)
    out = lambda x: model.module.apply(params, x, None, None, model=model)[0]
    jacobian = jax.jit(jax.jacobian(lambda x: out(x)[0].sum(-1)))(x)[:, 0]
  size = np.abs(jacobian).sum(-1)
  assert (size[np.triu_indices(11, 1)] == 0).all()
  assert (size[np.tril_indices(11)] != 0).all()


@pytest.mark.parametrize("arch", MODULES)
def test_the_state_has_one_size_and_the_card_says_it(arch):
  model = MODELS[arch]()
  params = jax.eval_shape(model.init, jax.random.key(0))

  def size(length):
    start = lambda p: model.init_state(p, 1, length).layers
    leaves = jax.tree.leaves(jax.eval_shape(start, params))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  assert not model.grows
  rows, labels = model.levels()
  reach = "in sections of 16" if arch == "titans_mac" else "to 12"
  names = ["Titans memory", f"attention {reach}"]
  assert [row.name for row in rows[:2]] == names
  assert size(1) == size(4096) == sum(row.state_bytes for row in rows)
  slots = 16 * (4 * 64 + 1) if arch == "titans_mac" else 11 * (2 * 64 + 1) + 2
  assert rows[1].state_bytes == 2 * 4 * slots
  assert sum(row.parameters for row in rows) == model.parameter_count()
  assert [row.level for row in card.rank(rows)][:2] == [2, 1]
  assert set(jax.tree.leaves(labels(params))) == {"slow"}


@pytest.mark.parametrize("arch", MODULES)
@pytest.mark.parametrize("size,total", [
  ("340m", 339.0), ("760m", 756.7), ("1b3", 1302.0),
])  # fmt: skip
def test_sizes_are_the_formula_and_the_table(arch, size, total):
  """docs/mathematics.md 7.2, in millions, with P and norms of branches."""
  net = build.model(build.resolve(named.load_config(f"{arch}_{size}")))
  assert abs(net.parameter_count() / 1e6 - total) < 0.1
  D, H, K, M = net.width, net.heads, net.head_dim, net.mixer.hidden
  assert M == 2 * K and net.mixer.persistent == 4
  norms = 1 if arch == "titans_mal" else 2
  mixer = 9 * D * D + 12 * D + 3 * H * (D + 1) + 2 * H * K * M + K
  mixer += (4 + norms) * D
  F, L = net.cms.widths[0], net.layers
  expected = 32_000 * D + L * (mixer + 2 * D + 3 * D * F) + D
  assert net.parameter_count() == expected


@pytest.mark.parametrize("arch", MODULES)
def test_every_parameter_and_state_has_a_place_on_the_mesh(arch):
  model, mesh = MODELS[arch](), sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  places = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]
  assert places["attention"]["w_q"].spec[1:] == ("fsdp", "tensor")
  assert places["lmm"]["memory"]["w_in"].spec[1:] == ("tensor", "fsdp", None)
  made = sharding.sequence_shardings(state, mesh).layers
  if arch == "titans_mac":
    carried = made.segment.carried
    cache, w = carried.cache, carried.anchor
  else:
    cache, w = made.attention, made.lmm.memory.w
  assert cache.keys_BxSxHxK.spec[3] == w["w_in"].spec[2] == "tensor"


@pytest.mark.parametrize("arch", ["titans_mag", "titans_mac"])
def test_eight_devices_are_one(arch):
  """Logits on a mesh of 4 by 2 and on one device."""
  model = small(arch)
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 16, (4, 8))
  run = lambda p, tokens: model.apply(p, tokens)[0]
  alone = jax.jit(run)(params, tokens)
  mesh = sharding.mesh(fsdp=4, tensor=2)
  params = jax.device_put(
    params, sharding.param_shardings(params, model.axes(), mesh)
  )
  rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    many = jax.jit(run)(params, rows)
  np.testing.assert_allclose(many, alone, atol=1e-6)


def test_decay_is_for_matrices():
  model = MODELS["titans_mac"]()
  params = jax.eval_shape(model.init, jax.random.key(0))
  mixer = optimizer.decay_mask(model.leaves())(params)["blocks"]["mixer"]
  assert mixer["persistent"] and mixer["lmm"]["memory"]["w_in"]
  assert all(mixer["attention"].values())
  assert not mixer["lmm_norm"]["scale"] and not mixer["lmm"]["conv_q"]
  assert not mixer["attention_norm"]["scale"]


@pytest.mark.parametrize("arch,change,message", [
  ("titans_mag", dict(window=1), "mixer.window must be a whole number from 2"),
  ("titans_mal", dict(window=2.5), "model.mixer.window must be a whole number"),
  ("titans_mag", dict(persistent=-1), "model.mixer.persistent must be a whole"),
  ("titans_mag", dict(mag_gate="tanh"), "mag_gate must be one of sigmoid"),
  ("titans_mac", dict(segment=10), "multiple of model.mixer.chunk=4, got 10"),
  ("titans_mac", dict(segment=0), "model.mixer.segment must be a whole"),
  ("titans_mac", dict(eta_max=0.0), "mixer.eta_max must be a number above 0"),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(arch, change, message):
  with pytest.raises(ValueError, match=message):
    small(arch, **change)


@pytest.mark.parametrize("arch,name", [
  ("titans_mal", "mag_gate"), ("titans_mac", "window"),
  ("titans_mag", "segment"), ("titans_lmm", "persistent"),
])  # fmt: skip
def test_a_switch_of_another_row_is_named(arch, name):
  with pytest.raises(ValueError, match=f"no model.mixer.{name}; it has"):
    lm.options(arch, {name: 4})


@pytest.mark.parametrize("change,message", [
  (dict(heads=3), "heads \\* model.head_dim"),
  (dict(heads=8, head_dim=1), "must be even for RoPE"),
  (dict(mixer=titans.Options(chunk=4)), "model.mixer belongs to"),
])  # fmt: skip
def test_shapes_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(small("titans_mac"), **change)
