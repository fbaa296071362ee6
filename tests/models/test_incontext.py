"""Levels that learn in context, against a loop over micro-chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.models import cms, layers, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers.attention import mixer as attention

LEVELS = cms.Options(("high", "mid", "low"), (12, 8, 8), (0, 0, 0))
SEQUENCE = 40


def model(base=None, levels=LEVELS, **options) -> incontext.InContextModel:
  base = base or lm.LanguageModel(
    "hope_attention", width=16, layers=3, heads=2, head_dim=8, vocab_size=32,
    sequence_length=SEQUENCE, cms=levels, mixer=attention.Options(window=12),
  )  # fmt: skip
  standard = dict(chunks=(4, 12), rates=(0.4, 0.3), fast_layers=2)
  return incontext.InContextModel(
    base, incontext.Options(**(standard | options))
  )


def generic(net, seed=0):
  """Perturbed parameters in float64."""
  params = net.init(jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree,
    [np.asarray(x, float) + 0.1 * rng.normal(size=x.shape) for x in leaves],
  )


def draw(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, 32, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(net, params, tokens, state=None, segment_ids=None, learn=None):
  return net.apply(params, tokens, state, segment_ids=segment_ids, learn=learn)


def plain(params):
  return {k: v for k, v in params.items() if k != "in_context"}


KERNELS = ("w_gate", "w_up", "w_down")


@functools.partial(jax.jit, static_argnums=0)
def read_chunk(net, params, theta, carried, chunk, targets, weights):
  """(gradient by theta of the chunk's loss, (logits, state)): the whole base.

  An independent way: no split of the layers, no vmap.
  """
  cut = net.base.layers - net.fast_layers

  def loss(theta):
    feed_forward = dict(params["blocks"]["cms"])
    for level, fast in theta.items():
      both = {
        k: jnp.concatenate([feed_forward[level][k][:cut], fast[k]])
        for k in KERNELS
      }
      feed_forward[level] = {**feed_forward[level], **both}
    blocks = {**params["blocks"], "cms": feed_forward}
    logits, state, _ = net.base.apply(
      {**plain(params), "blocks": blocks}, chunk[None], carried
    )
    logp = jax.nn.log_softmax(logits[0, : len(targets)])
    nats = -logp[jnp.arange(len(targets)), targets]
    return (weights * nats).sum(), (logits[0], state)

  return jax.grad(loss, has_aux=True)(theta)


def axpy(a, x, y):
  return jax.tree.map(lambda x, y: a * x + y, x, y)


def updated(options, i, theta, velocity, g):
  """Weights and velocity of a level after one step of its rule."""
  norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
  g = axpy(jnp.minimum(1, options.clip / norm) - 1, g, g)
  if options.rule == "momentum":
    g = velocity = axpy(options.momentum, velocity, g)
  return axpy(-i, g, theta), velocity


def restarted(options, begin, theta, g):
  rate = options.nested_rate
  return {
    "none": begin,
    "reptile": axpy(rate, axpy(-1, begin, theta), begin),
    "fomaml": axpy(-rate, g, begin),
  }[options.nested_meta]


def by_hand(net, params, row, learn=None, first_order=False):
  """Logits [T,V] of one row: micro-chunk by micro-chunk, level by level."""
  options, base = net.options, net.base
  learn = np.ones(len(row)) if learn is None else learn
  C, cut = options.chunks[0], base.layers - net.fast_layers
  theta = {
    level: {k: params["blocks"]["cms"][level][k][cut:] for k in KERNELS}
    for level in net.fast_levels
  }
  begin = dict(theta)
  velocity = jax.tree.map(jnp.zeros_like, theta)
  gathered = {level: [] for level in theta}
  last, out = {}, []
  rates = jnp.exp(params["in_context"]["log_rate"])
  carried = base.init_state(plain(params), 1, len(row))
  for j, at in enumerate(range(0, len(row), C)):
    targets = row[at + 1 : at + C + (options.targets == "next")]
    weights = jnp.asarray(learn[at : at + len(targets)])
    grads, (logits, carried) = read_chunk(
      net, params, theta, carried, row[at : at + C], targets, weights
    )
    if first_order:
      grads = jax.lax.stop_gradient(grads)
    out.append(logits)
    for level in theta:
      gathered[level].append((grads[level], weights.sum()))
    if at + C >= len(row):
      return jnp.concatenate(out)
    below = None
    for i, level in enumerate(net.fast_levels):
      if (j + 1) * C % options.chunks[i]:
        continue
      parts, sizes = zip(*gathered[level])
      gathered[level] = []
      scale = 1 / sum(sizes) if options.reduce == "mean" else 1.0
      g = jax.tree.map(lambda *x, by=scale: by * sum(x), *parts)
      last[level] = g
      theta[level], velocity[level] = updated(
        options, rates[i], theta[level], velocity[level], g
      )
      if below and base.cms.variant == "nested":
        begin[below] = theta[below] = restarted(
          options, begin[below], theta[below], last[below]
        )
        velocity[below] = jax.tree.map(jnp.zeros_like, theta[below])
      below = level


# Between them every option.
CASES = {
  "sequential": dict(clip=0.05),
  "next": dict(
    targets="next", reduce="sum", rates=(0.05, 0.02), rule="momentum"
  ),
  "reptile": dict(
    variant="nested", nested_meta="reptile", nested_rate=0.5, rule="momentum"
  ),
  "fomaml": dict(
    variant="nested", nested_meta="fomaml", chunks=(4, 8, 16),
    rates=(0.4, 0.3, 0.2), fast_levels=("high", "mid", "low"),
  ),
  "nested": dict(variant="nested", fast_layers=1),
  "independent": dict(
    variant="independent", chunks=(8,), rates=(0.5,), fast_levels=("mid",)
  ),
}  # fmt: skip


def of_case(name):
  options = dict(CASES[name])
  levels = dataclasses.replace(
    LEVELS, variant=options.pop("variant", "sequential")
  )
  return model(levels=levels, **options)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_loop(name):
  net, tokens = of_case(name), draw(2, 31)
  learn = np.random.default_rng(5).uniform(size=tokens.shape)
  learn[1] = 1
  with jax.enable_x64(True):
    params = generic(net)
    made, _, _ = apply(net, params, tokens, learn=learn)
    for b in range(2):
      same = by_hand(net, params, tokens[b], learn[b])
      np.testing.assert_allclose(made[b], same, atol=1e-11)
    still = apply(net, params, tokens, learn=np.zeros(tokens.shape))[0]
    assert np.abs(made - still)[:, net.options.chunks[0] :].max() > 1e-3


@pytest.mark.parametrize("outer", ["full", "first_order"])
def test_the_outer_gradient_is_that_of_the_loop(outer):
  net, tokens = model(outer=outer, fast_layers=1), draw(1, 14, seed=1)

  def loss(logits):
    logp = jax.nn.log_softmax(logits[:-1])
    return -logp[jnp.arange(13), tokens[0, 1:]].mean()

  with jax.enable_x64(True):
    params = generic(net, seed=1)
    ours = jax.grad(lambda p: loss(apply(net, p, tokens)[0][0]))(params)
    first = outer == "first_order"
    theirs = jax.grad(
      lambda p: loss(by_hand(net, p, tokens[0], first_order=first))
    )(jax.tree.map(jnp.asarray, params))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, theirs
    )


def test_dgd_erases_what_each_kernel_reads():
  """One micro-chunk, one layer: the step is SGD's and rate · uᵀ(u W) w / w."""
  base = dataclasses.replace(model().base, layers=1)
  options = dict(chunks=(4,), rates=(0.1,), fast_levels=("high",), clip=1e9)
  tokens = draw(1, 5, seed=2)
  with jax.enable_x64(True):
    sgd, dgd = (
      model(base, **options, fast_layers=1, rule=rule)
      for rule in ("sgd", "dgd")
    )
    params = generic(sgd, seed=2)
    after = [
      apply(net, params, tokens)[1].levels["high"].params for net in (sgd, dgd)
    ]
    x = params["embed"][tokens]
    block = jax.tree.map(lambda w: w[0], params["blocks"])
    x, _, _ = base.mix(block, x, None, None)
    _, read = cms.apply_and_tell(block["cms"], x, base.cms)
    rate = np.exp(params["in_context"]["log_rate"][0])
    for kernel in ("w_gate", "w_up", "w_down"):
      u = read["high"]["hidden" if kernel == "w_down" else "x"][0, :3]
      erased = rate / 3 * u.T @ (u @ block["cms"]["high"][kernel])
      np.testing.assert_allclose(
        after[0][kernel][0, 0] - after[1][kernel][0, 0], erased, atol=1e-12
      )


def test_without_rate_or_updates_it_is_the_plain_chain():
  net, tokens = model(fast_layers=1), draw(2, 31)
  params, learn = generic(net), np.ones(tokens.shape)
  still = apply(net.base, plain(params), tokens)[0]
  rates = params["in_context"]["log_rate"]
  no_rate = {**params, "in_context": {"log_rate": np.full_like(rates, -np.inf)}}
  made = apply(net, no_rate, tokens, learn=learn)[0]
  np.testing.assert_allclose(made, still, atol=2e-6)
  loss = lambda p: apply(net, p, tokens, learn=learn)[0].sum()
  grads = jax.grad(loss)(no_rate)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  slow = model(net.base, chunks=(40, 80), fast_layers=1)
  params["in_context"]["log_rate"] = np.zeros(2)
  np.testing.assert_allclose(apply(slow, params, tokens)[0], still, atol=2e-6)


def test_nested_with_slow_levels_beyond_the_text_is_sequential():
  tokens = draw(2, 31)
  nested = dataclasses.replace(LEVELS, variant="nested")
  made = [
    model(levels=levels, chunks=(4, 32), fast_layers=1)
    for levels in (LEVELS, nested)
  ]
  params = generic(made[0])
  a, b = (apply(net, params, tokens)[0] for net in made)
  np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_is_not_to_be_learned_is_not():
  """With learn 0 nothing is written; a target with weight 0 leaves no trace."""
  net, tokens = model(fast_layers=1), draw(2, 31)
  params = generic(net)
  nothing = apply(net, params, tokens, learn=np.zeros(tokens.shape))[0]
  still = apply(net.base, plain(params), tokens)[0]
  np.testing.assert_allclose(nothing, still, atol=2e-6)

  def gradient(params):
    learn = np.tile(np.arange(31) > 11, (2, 1)).astype(float)
    logits = apply(net, params, tokens, learn=learn)[0]
    return logits[:, 20:].std()

  grads = jax.grad(gradient)(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_rows_that_ended_early_go_on_as_if_alone():
  """A fresh call with rows of several lengths, and then single tokens."""
  net, tokens = model(targets="next"), draw(4, 40)
  lengths = (3, 8, 13, 26)
  with jax.enable_x64(True):
    params = generic(net)
    whole = apply(net, params, tokens, segment_ids=np.ones_like(tokens))[0]
    ids = (np.arange(40)[None] < np.array(lengths)[:, None]).astype(np.int32)
    logits, state, _ = apply(net, params, tokens * ids, segment_ids=ids)
    step = lambda x, state: apply(net, params, x, state)[:2]
    for b, n in enumerate(lengths):
      np.testing.assert_allclose(logits[b, :n], whole[b, :n], atol=1e-11)
    for i in range(14):
      x = np.stack([tokens[b, n + i] for b, n in enumerate(lengths)])
      made, state = step(x[:, None], state)
      for b, n in enumerate(lengths):
        np.testing.assert_allclose(made[b, 0], whole[b, n + i], atol=1e-11)


def test_documents_begin_with_fresh_weights():
  net, tokens = model(reset="document"), draw(3, 36)
  assert net.alignment == 12
  ids = np.repeat([1, 2, 0, 3], [12, 7, 5, 12])[None].astype(np.int32)
  with jax.enable_x64(True):
    params = generic(net)
    packed = apply(net, params, tokens[:1] * (ids > 0), segment_ids=ids)[0]
    call = net.init_state(params, 1, 36)
    later, _, _ = apply(net, params, tokens[:1], call, segment_ids=ids)
    rows = tokens[0].reshape(3, 12)
    one = (ids > 0).reshape(3, 12).astype(np.int32)
    alone = apply(net, params, rows * one, segment_ids=one)[0]
    for row, (a, b) in zip(alone, ((0, 12), (12, 19), (24, 36))):
      np.testing.assert_allclose(packed[0, a:b], row[: b - a], atol=1e-11)
      np.testing.assert_allclose(later[0, a:b], row[: b - a], atol=1e-11)


def test_rows_at_edges_need_fewer_pieces_and_give_the_same_numbers():
  """Documents at edges of micro-chunks, padding before edges and at the end."""
  net = model(reset="document")
  edges = lm.at_edges(net)
  assert edges.at_edge and not net.at_edge
  params, tokens = generic(net), draw(2, SEQUENCE)
  ids = np.repeat([[1, 1, 1, 2, 2, 3, 3, 3, 3, 4]] * 2, 4, axis=1)
  ids = ids.astype(np.int32)
  ids[0, 10:12], ids[0, 19], ids[1, 34:] = 0, 0, 0
  half = SEQUENCE // 2
  states = {net: None, edges: None}
  for part in (slice(half), slice(half, None)):
    made = {}
    for each in states:
      out = apply(each, params, tokens[:, part], states[each], ids[:, part])
      made[each], states[each] = out[0], out[1]
    real = (ids[:, part] > 0)[..., None]
    np.testing.assert_allclose(
      made[net] * real, made[edges] * real, rtol=0, atol=1e-12
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
    states[net], states[edges],
  )  # fmt: skip


def test_a_start_that_learns_by_its_full_gradient():
  """Once restarted, it stands where the loss of its last period sends it."""
  net = model(
    levels=dataclasses.replace(LEVELS, variant="nested"), chunks=(4, 8),
    fast_layers=1, nested_meta="full", nested_rate=0.5,
  )  # fmt: skip
  tokens = draw(1, 9, seed=4)
  with jax.enable_x64(True):
    params = generic(net)
    cut = net.base.layers - 1
    begin = {k: params["blocks"]["cms"]["high"][k][cut:] for k in KERNELS}
    mid = {k: params["blocks"]["cms"]["mid"][k][cut:] for k in KERNELS}
    rate = np.exp(params["in_context"]["log_rate"][0])

    def piece(high, carried, at):
      theta = {"high": high, "mid": mid}
      grads, (logits, carried) = read_chunk(
        net, params, theta, carried, tokens[0, at : at + 4],
        tokens[0, at + 1 : at + 4], jnp.ones(3),
      )  # fmt: skip
      logp = jax.nn.log_softmax(logits[:3])
      nats = -logp[jnp.arange(3), tokens[0, at + 1 : at + 4]]
      return grads["high"], carried, nats.mean()

    def last(begin):
      carried = net.base.init_state(plain(params), 1, 9)
      g, carried, _ = piece(begin, carried, 0)
      g = jax.tree.map(lambda x: x / 3, g)
      high, _ = updated(net.options, rate, begin, None, g)
      return piece(high, carried, 4)[2]

    moved = axpy(-0.5, jax.grad(last)(begin), begin)
    fresh = apply(net, params, tokens)[1]
    state = net.init_state(params, 1)
    for token in tokens.T:
      _, state, _ = apply(net, params, token[None], state)
    for made in (fresh, state):
      # The ninth token closes the second micro-chunk.
      made = jax.tree.map(lambda x: x[0], made.levels["high"].params)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), made, moved
      )


def test_restarts_in_context_are_not_those_of_the_optimizer():
  net = of_case("reptile")
  assert net.cms.variant == "sequential"
  assert net.base.cms.variant == "nested"


@pytest.mark.parametrize("loss", ["local_dot", "local_l2"])
def test_a_local_loss_is_gradient_descent_on_it(loss):
  """One layer, one level, chunks of 4: weights move at chunk edges only."""
  base = dataclasses.replace(
    model().base, layers=1, cms=cms.Options(("high",), (12,), (0,))
  )
  net = model(
    base, chunks=(4,), rates=(0.5,), clip=1e9, fast_layers=1,
    inner_loss=loss, reset="document",
  )  # fmt: skip
  tokens = draw(1, 15, seed=3)
  with jax.enable_x64(True):
    params = generic(net)
    block = jax.tree.map(lambda w: w[0], params["blocks"])
    w_target = params["in_context"]["w_target"]["high"][0]
    rate = np.exp(params["in_context"]["log_rate"][0])
    x, _, _ = base.mix(block, jnp.asarray(params["embed"])[tokens], None, None)
    own = dict(block["cms"]["high"])
    z = layers.rms_norm(x, own.pop("norm")["scale"])[0]
    read = lambda w, z: layers.dense(
      layers.gated(z, w["w_gate"], w["w_up"]), w["w_down"]
    )

    def inner(w, z):
      y, target = read(w, z), z @ w_target
      if loss == "local_dot":
        return -(y * target).sum()
      return 0.5 * ((y - target) ** 2).sum()

    out = []
    for at in range(0, 15, 4):
      chunk = z[at : at + 4]
      out.append(read(own, chunk))
      own = axpy(-rate / 4, jax.grad(inner)(own, chunk), own)
    same = base.logits(params, x + jnp.concatenate(out)[None])
    made = apply(net, params, tokens)[0]
    np.testing.assert_allclose(made, same, atol=1e-10)
    frozen = apply(net, params, tokens, learn=np.zeros_like(tokens))[0]
    still = apply(base, plain(params), tokens)[0]
    np.testing.assert_allclose(frozen, still, atol=1e-12)


@pytest.mark.parametrize(
  "change,sentence",
  [
    (dict(inner_loss="local_l2"), "needs model.cms.reset=document"),
    (
      dict(inner_loss="local_l2", reset="document", rule="momentum"),
      "needs model.cms.rule=sgd or dgd",
    ),
    (
      dict(
        inner_loss="local_dot", reset="document",
        levels=dataclasses.replace(LEVELS, variant="nested"),
      ),
      "has no variant 'nested'",
    ),
    (dict(inner_loss="mine"), "model.cms.inner_loss must be one of"),
  ],
)  # fmt: skip
def test_what_a_local_loss_cannot_do_is_told(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    model(**change)


@pytest.mark.parametrize(
  "change,sentence",
  [
    (dict(chunks=(4, 6)), "each a multiple"),
    (dict(chunks=()), "chunks must have an entry"),
    (dict(chunks=(1, 4)), "use 'next'"),
    (dict(rates=(0.1,)), "one entry for each of model.cms.chunks"),
    (dict(rates=(-1.0, 0.1)), r"rates\[0\] must be a number from 0"),
    (dict(rule="adam"), "model.cms.rule must be one of sgd, momentum, dgd"),
    (dict(outer="none"), "model.cms.outer must be one of"),
    (dict(fast_layers=4), "at most 3"),
    (dict(fast_levels=("mid", "high")), "fastest first"),
    (dict(fast_levels=("high",)), "one entry for each of the fast levels"),
    (dict(momentum=1.0), "momentum must be a number from 0 to below 1"),
    (dict(clip=0.0), "clip must be a number above 0"),
    (dict(nested_rate=2.0), "nested_rate must be a number from 0 to 1"),
    (dict(reset="never"), "model.cms.reset must be one of"),
  ],
)
def test_mistakes_are_told(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    model(**change)


def test_the_card_has_a_row_for_each_fast_level():
  net = model()
  rows = {row.name: row for row in net.levels()[0]}
  high = rows["high FFN, layers 2 to 3"]
  assert (high.chunk, high.transfer) == (4, "init")
  assert high.bptt == (SEQUENCE - 1) // 4
  assert high.parameters == 3 * 16 * 12 * 2
  total = sum(row.parameters for row in rows.values())
  assert total == net.parameter_count()
