"""The walk by XLA and by interpreted kernels, against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nl_jax import sharding
from nl_jax.kernels import walk
from nl_jax.kernels.walk import blocks, pallas, plans, products
from tests.kernels import walk_bodies as bodies

C = 8
SPEC = P(("replica", "fsdp"), None, "tensor")


def draw(rng, *shape, scale=0.5):
  return jnp.asarray(rng.normal(size=shape) * scale)


def call(kind, B=2, N=6, H=4, K=16, ids=False, dtype=jnp.float32):
  """(body, slow, xs, places, state) with documents, padding, an open end.

  Row 0 ends in an open chunk and padding, row 1 has padding before its first
  token and a document that begins with its third chunk.
  """
  rng = np.random.default_rng(0)
  T = N * C
  x = {n: draw(rng, B, T, H * K, scale=K**-0.5) for n in ("q", "k", "v")}
  x["la"] = -jnp.abs(draw(rng, B, T, H))
  if kind == "linear":
    slow = dict(w=draw(rng, H, K, K), b=draw(rng, H, 1, 1))
    state = walk.State(dict(w=draw(rng, B, H, K, K)), dict())
    state = state._replace(s=dict(s=draw(rng, B, H, K, K)))
    body = bodies.linear
  else:
    shapes = dict(w_in=(H, K, 2 * K), w_out=(H, 2 * K, K))
    slow = {n: draw(rng, *t, scale=t[1] ** -0.5) for n, t in shapes.items()}
    w = {n: draw(rng, B, *t, scale=0.1) for n, t in shapes.items()}
    state = walk.State(w, {})
    body = bodies.mlp
  real = np.ones((B, N, C), bool)
  closes = np.ones((B, N), bool)
  resets = np.zeros((B, N), bool)
  documents = np.zeros((B, N, C), np.int32)
  if N > 3:
    real[0, -2, 5:] = real[0, -1] = real[1, 0, :3] = False
    closes[0, -2:] = False
    resets[1, 2] = True
    documents[1, -3, 2:] = 1
    documents[1, -2, 1:], documents[1, -2, 6:] = 1, 2
    documents[0, -2, 4:] = 1
  places = walk.Places(*map(jnp.asarray, (real, resets, closes)))
  if ids:
    places = places._replace(ids=jnp.asarray(documents))
  return body, *cast((slow, x), dtype), places, cast(state, dtype)


def cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def weigh(outs):
  """A number that every output moves; sums have no gradient."""
  number = lambda x: jnp.sum(
    jnp.sin(x)
    * (0.2 + jnp.cos(jnp.arange(x.size, dtype=x.dtype))).reshape(x.shape)
  )
  return sum(number(x) for x in jax.tree.leaves(outs[:3]))


def both_ways(args, **how):
  """Outputs and the gradients of (slow, xs, state)."""
  body, slow, xs, places, state = args

  @jax.jit
  def run(slow, xs, state, places):
    def loss(slow, xs, state):
      outs = walk.walk(body, slow, xs, places, state=state, **how)
      # What stands in padding is nobody's.
      real = places.real.reshape(*places.real.shape[:1], -1, 1)
      ys = jax.tree.map(lambda y: jnp.where(real, y, 0), outs[0])
      outs = (ys, *outs[1:])
      return weigh(outs), outs

    grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, outs), grads = grad(slow, xs, state)
    return dict(outs=outs, grads=grads)

  with jax.default_matmul_precision("highest"):
    return run(slow, xs, state, places)


def close(x, y, tolerance):
  flat = lambda t: {
    jax.tree_util.keystr(k): np.asarray(v)
    for k, v in jax.tree_util.tree_leaves_with_path(t)
  }
  x, y = flat(x), flat(y)
  assert x.keys() == y.keys()
  for k in x:
    size = max(np.abs(y[k]).max(), 1e-30)
    np.testing.assert_allclose(x[k], y[k], 0, tolerance * size, err_msg=k)


@pytest.mark.parametrize("ids", [False, True])
def test_xla_is_the_loop_over_tokens(ids):
  with jax.enable_x64(True):
    args = call("linear", ids=ids, dtype=jnp.float64)
    body, slow, xs, places, state = args
    B, N, _ = places.real.shape
    ys, end, edges, sums = walk.walk(
      body, slow, xs, places, state=state, implementation="xla"
    )
    assert ys.dtype == jnp.float64 and sums.dtype == jnp.float32
    fold = lambda x: np.asarray(x).reshape(B, N, C, 4, -1)
    loop = bodies.linear_tokens(
      *jax.tree.map(np.asarray, (slow, state)), jax.tree.map(fold, xs),
      jax.tree.map(np.asarray, places),
    )  # fmt: skip
    real = np.asarray(places.real)
    close(fold(ys)[real], loop[0][real], 1e-12)
    close((end.w["w"], end.s["s"], edges["w"]), loop[1:4], 1e-12)
    close(sums, loop[4], 1e-6)


@pytest.mark.parametrize(
  ("kind", "shape", "how"),
  [
    ("linear", {}, dict(save=1)),
    ("linear", {}, dict(save=2)),
    ("linear", dict(K=64), dict(save=3, heads=2)),
    ("linear", dict(ids=True), dict(save=2, chunk_free=True)),
    ("linear", dict(N=1, H=2), {}),
    ("mlp", dict(H=2), dict(save=3)),
    ("mlp", dict(H=2, K=128, N=4), dict(heads=1, save=2)),
  ],
)
def test_kernels_are_the_xla_form(kind, shape, how):
  """Values, states, edges, sums and every gradient."""
  args = call(kind, **shape)
  free = how.get("chunk_free", False)
  xla = both_ways(args, implementation="xla", save=2, chunk_free=free)
  fused = both_ways(args, implementation="pallas_interpret", **how)
  close(fused["outs"], xla["outs"], 1e-5)
  close(fused["grads"], xla["grads"], 1e-4)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_padding_is_nothing_whatever_stands_in_it(implementation):
  args = call("linear")
  body, slow, xs, places, state = args
  real = places.real.reshape(2, -1, 1)
  of = lambda value: {k: jnp.where(real, x, value) for k, x in xs.items()}
  how = dict(implementation=implementation)
  clean = both_ways((body, slow, of(0.0), places, state), **how)
  dirty = both_ways((body, slow, of(jnp.nan), places, state), **how)
  close(dirty, clean, 0)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_nothing_passes_from_document_to_document(implementation):
  args = call("linear")
  body, slow, xs, places, state = args

  def later(xs):
    ys, end, *_ = walk.walk(
      body, slow, xs, places, state=state, implementation=implementation
    )
    return ys[1, 2 * C :].sum() + sum(x[1].sum() for x in jax.tree.leaves(end))

  for g in jax.tree.leaves(jax.jit(jax.grad(later))(xs)):
    assert not g[1, : 2 * C].any() and g[1, 2 * C :].any()


def test_a_chunk_in_two_calls_is_the_chunk():
  body, slow, xs, _, state = call("mlp", N=2)
  real = jnp.ones((2, 2, C), bool)
  closes = jnp.ones((2, 2), bool)
  run = functools.partial(walk.walk, body, slow, implementation="xla")
  whole = run(xs, walk.Places(real, None, closes), state=state)
  early = jnp.arange(C) < 5
  part = lambda mask, n: (
    {k: x[:, n * C : (n + 1) * C] for k, x in xs.items()},
    real[:, :1] & jnp.broadcast_to(mask, (2, 1, C)),
  )
  x, mask = part(True, 0)
  _, state, edge, _ = run(
    x, walk.Places(mask, None, closes[:, :1]), state=state
  )
  x, mask = part(early, 1)
  ys, state, edge, _ = run(
    x, walk.Places(mask, None, ~closes[:, :1]), state=state, anchor=edge
  )
  close(ys["y"][:, :5], whole[0]["y"][:, C : C + 5], 1e-5)
  x, mask = part(~early, 1)
  ys, state, edge, _ = run(
    x, walk.Places(mask, None, closes[:, :1]), state=state, anchor=edge
  )
  close(ys["y"][:, 5:], whole[0]["y"][:, C + 5 :], 1e-5)
  close((state, edge), whole[1:3], 1e-5)


def test_xla_has_a_second_derivative_and_works_under_vmap():
  with jax.enable_x64(True):
    args = call("mlp", N=4, H=1, K=4, dtype=jnp.float64)
    body, slow, xs, places, state = args

    def loss(slow):
      outs = walk.walk(
        body, slow, xs, places, state=state, implementation="xla", save=2
      )
      return weigh(outs)

    one = jax.tree.map(jnp.ones_like, slow)
    curve = lambda slow: jax.jvp(jax.grad(loss), (slow,), (one,))[1]
    twice = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), slow)
    got = jax.jit(jax.vmap(curve))(twice)
    step = lambda scale: jax.tree.map(
      lambda x, o: 0.5 * x + scale * o, slow, one
    )
    grad = jax.jit(jax.grad(loss))
    numeric = jax.tree.map(
      lambda a, b: (a - b) / 2e-5, grad(step(1e-5)), grad(step(-1e-5))
    )
    close(jax.tree.map(lambda x: x[1], got), numeric, 1e-6)


def test_xla_carries_whatever_a_memory_keeps():
  """Counts and caches of a row, set to 0 with it; outputs of one head."""
  _, slow, xs, places, state = call("linear")

  def body(slow, state, x, at):
    seen = state.s["seen"] + at.real[:, 0, :, 0].sum(-1).astype(jnp.int32)
    y = x["q"].mean(1, keepdims=True) + state.s["cache"][:, None]
    return state._replace(s=dict(seen=seen, cache=y[:, 0])), y, None

  s = dict(seen=jnp.zeros((2,), jnp.int32), cache=jnp.zeros((2, C, 16)))

  def run(xs):
    ys, end, *_ = walk.walk(
      body, slow, xs, places, state=state._replace(s=s), implementation="xla"
    )
    return ys.sum(), (ys, end.s)

  grads, (ys, s) = jax.grad(run, has_aux=True)(xs)
  assert ys.shape == (2, 6 * C, 16) and grads["q"].any()
  np.testing.assert_array_equal(s["seen"], [37, 32])
  assert s["cache"].shape == (2, C, 16)


def test_a_kernel_differentiated_twice_says_so():
  body, slow, xs, places, state = call("linear", N=1, H=1)

  def loss(slow):
    return weigh(walk.walk(
      body, slow, xs, places, state=state, implementation="pallas_interpret"
    ))  # fmt: skip

  slope = lambda slow: jax.grad(loss)(slow)["w"].sum()
  with pytest.raises(NotImplementedError, match="implementation='xla'"):
    jax.grad(slope)(slow)


def test_eight_devices_are_one():
  """No collective forward; backward only the sum of slow parameters."""
  body, slow, xs, places, state = args = call("linear", B=4, H=8, K=32, N=2)
  how = dict(implementation="pallas_interpret", spec=SPEC)
  alone = both_ways(args, **how)
  mesh = sharding.mesh(replica=2, fsdp=2, tensor=2)
  put = lambda tree, spec: jax.device_put(
    tree, jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)
  )
  own = P(SPEC[0], "tensor")
  args = (
    body, put(slow, P("tensor")), put(xs, SPEC), put(places, P(SPEC[0])),
    put(state, own),
  )  # fmt: skip
  with jax.set_mesh(mesh):
    close(both_ways(args, **how), alone, 1e-5)
    forward = jax.jit(
      lambda slow, xs, places, state: walk.walk(
        body, slow, xs, places, state=state, **how
      )
    )
    text = forward.lower(*args[1:]).compile().as_text()
  for name in ("all-", "collective-", "reduce-scatter"):
    assert name not in text


def races(run):
  """Whether steps of the kernels of run(how to interpret) race; its value."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as found

  how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  value = jax.block_until_ready(run(how))
  return found.races.races_found, value


def test_steps_do_not_race():
  body, slow, xs, places, state = call("linear", N=2, H=4, K=64)
  tile = products.Tile(fused=True)

  def run(interpret):
    how = blocks.How(body, tile, C, 2, 1, "walk", 2**26, interpret)
    loss = lambda *args: weigh(pallas.walk(how, *args[:2], places, args[2]))
    return jax.jit(jax.grad(loss, (0, 1, 2)))(slow, xs, state)

  raced, got = races(run)
  assert not raced
  close(got, run(True), 1e-5)


def test_races_would_be_found():
  def kernel(ref):
    ref[...] = jnp.full((8, 128), pl.program_id(0), jnp.float32)

  def run(interpret):
    return pl.pallas_call(
      kernel,
      grid=(2,),
      out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
      out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
      interpret=interpret,
    )()

  assert races(run)[0]


@pytest.mark.parametrize(
  ("names", "times"), [((), 2), (("walk_y", "walk_end", "walk_states"), 1)]
)
def test_a_remat_policy_spares_the_second_walk(names, times):
  body, slow, xs, places, state = call("linear", N=2, H=2)

  def loss(slow):
    return weigh(walk.walk(
      body, slow, xs, places, state=state, implementation="pallas_interpret"
    ))  # fmt: skip

  keep = jax.checkpoint_policies.save_only_these_names(*names)
  text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=keep)))(slow))
  assert text.count("name=walk_fwd") == times
  assert text.count("name=walk_bwd") == 1


def test_a_stack_keeps_as_many_states_as_fit():
  """Of 24 layers of HOPE at 1.3B, 8 heads and 64 chunks a device: 7.5 GiB."""
  w = jax.ShapeDtypeStruct((1, 8, 128, 1280), jnp.float32)
  state = walk.State({"w": w}, None)
  save = lambda chunks, policy: plans._save(chunks, state, policy)
  assert save(64, products.F32) == 1
  with walk.kept(24):
    assert save(64, products.F32) == 2
    # They are kept in bfloat16 where they are read in one pass.
    assert save(64, products.LEAN) == 1
    assert save(2048, products.LEAN) == 16
    # The next divisor of an odd number of chunks.
    assert save(63, products.F32) == 3
  assert save(64, products.F32) == 1


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (dict(anchor={}), "inside a chunk"),
    (dict(ids=jnp.zeros((2, 6, C), jnp.int32)), "pack documents"),
    (dict(chunk=1), "single token"),
    (dict(chunk=12), "8, 16, 32, 64 or 128 tokens, got 12"),
    (dict(chunk=256), "got 256"),
    (dict(slow=jnp.bfloat16), "float32 slow, got bfloat16"),
    (dict(window=jnp.zeros((2, 7, 16))), r"\[B, H, a, b\] with H=4"),
    (dict(heads=3), "cannot take 3 of 4 heads.*possible are 4"),
    (dict(implementation="pallas_tpu"), "needs a TPU, got the platform 'cpu'"),
  ],
)
def test_what_a_kernel_does_not_take_is_said(change, reason):
  body, slow, xs, places, state = call("linear")
  chunk = change.pop("chunk", C)
  fit = lambda x: jnp.resize(x, (2, 6 * chunk, x.shape[-1]))
  xs = jax.tree.map(fit, xs)
  places = places._replace(
    real=jnp.ones((2, 6, chunk), bool), ids=change.pop("ids", None)
  )
  slow = cast(slow, change.pop("slow", jnp.float32))
  if (window := change.pop("window", None)) is not None:
    state.s["window"] = window
  how = dict(implementation="pallas_interpret") | change
  with pytest.raises(ValueError, match=reason) as error:
    walk.walk(body, slow, xs, places, state=state, **how)
  assert str(error.value).startswith("walk cannot run as pallas_")


@pytest.mark.parametrize(
  ("how", "reason"),
  [
    (dict(implementation="cuda"), "no implementation 'cuda'; there are xla,"),
    (dict(policy="exact"), "no policy 'exact'; there are f32, lean"),
    (dict(xs=dict(q=jnp.zeros((2, 47, 64)))), r"got the shape \(2, 47, 64\)"),
    (dict(xs=dict(q=jnp.zeros((2, 48, 63)))), r"H\*d\] with B=2, N=6, C=8"),
  ],
)
def test_a_call_that_fits_nothing_is_said(how, reason):
  body, slow, xs, places, state = call("linear")
  how = dict(xs=xs) | how
  with pytest.raises(ValueError, match=reason):
    walk.walk(body, slow, places=places, state=state, **how)


def seen(implementation, dtype=jnp.float32, **how):
  """(tile, leading axes, type of inputs) that the chunk function sees."""
  _, slow, xs, places, state = call("linear", K=64)
  found = []

  def body(slow, state, x, at):
    found.append((at.tile, x["q"].shape[:-2], x["q"].dtype, at.real.shape))
    return bodies.linear(slow, state, x, at)

  jax.eval_shape(
    lambda *args: walk.walk(
      body, slow, cast(xs, dtype), places, state=state,
      implementation=implementation, **how
    )
  )  # fmt: skip
  return found[-1]


def test_the_chunk_function_sees_where_it_is():
  tile, lead, dtype, real = seen("xla")
  assert tile == products.Tile(products.F32) and lead == (2, 4)
  assert (dtype, real) == (jnp.float32, (2, 4, C, 1))
  # Of itself a CPU takes exact products.
  assert seen("xla", jnp.bfloat16)[0].policy is products.F32
  tile, lead, dtype, real = seen(
    "pallas_interpret", jnp.bfloat16, policy="lean"
  )
  assert tile == products.Tile(products.LEAN, fused=True, pack=4)
  assert (lead, dtype, real) == ((4,), jnp.float32, (4, C, 1))
  assert seen("pallas_interpret", heads=2)[0].pack == 2
  assert seen("xla", policy="lean")[0].policy is products.LEAN


def test_a_row_of_the_table_of_tiles_is_heads_and_save(monkeypatch):
  row = dict(chip="v5e", name="walk", C=C, K=64, M=64, heads=2, save=3)
  monkeypatch.setattr(plans, "_tiles", lambda: [row | {"C": 16}, row])
  assert seen("pallas_interpret")[1] == (2,)
  monkeypatch.setattr(plans, "_tiles", lambda: [row | {"name": "other"}])
  assert seen("pallas_interpret")[1] == (4,)


def test_a_step_that_does_not_fit_in_vmem_is_said():
  body, slow, xs, places, state = call("mlp", N=1, H=2)

  def grown(x, *axes):
    shape = [
      n * (128 if i - x.ndim in axes else 1) for i, n in enumerate(x.shape)
    ]
    return jax.ShapeDtypeStruct(shape, x.dtype)

  slow, state = jax.tree.map(lambda x: grown(x, -2, -1), (slow, state))
  xs = {k: grown(x, *() if k == "la" else (-1,)) for k, x in xs.items()}

  def run(slow, xs, places, state):
    return walk.walk(
      body, slow, xs, places, state=state, implementation="pallas_interpret"
    )

  with pytest.raises(ValueError, match=r"of 1 heads needs about \d+ MiB"):
    jax.eval_shape(run, slow, xs, places, state)


@pytest.mark.parametrize("form", ["xla", "pallas_interpret"])
def test_a_chunk_function_that_makes_something_else_is_said(form):
  _, slow, xs, places, state = call("linear")

  def run(make):
    body = lambda slow, state, x, at: make(state, x["q"], at)
    walk.walk(body, slow, xs, places, state=state, implementation=form)

  for make, said in {
    lambda s, q, at: (s._replace(s={"s": q}), q, None): "the state .* makes",
    lambda s, q, at: (s._replace(w=s.s), q, None): "the state .* makes",
    lambda s, q, at: (cast(s, jnp.bfloat16), q, None): "makes .*bfloat16",
    lambda s, q, at: (s, q): r"returns \(state, y, sums\)",
    lambda s, q, at: (s, q, q[..., 0]): r"sums .* are \[.*4, 1, n\], got",
  }.items():
    with pytest.raises(ValueError, match=said):
      run(make)


def test_outputs_without_heads_are_no_kernels():
  _, slow, xs, places, state = call("linear")
  mean = lambda slow, state, x, at: (state, x["q"].mean(0), None)
  with pytest.raises(ValueError, match=r"outputs .* are \[4, 8, d\]"):
    walk.walk(
      mean, slow, xs, places, state=state, implementation="pallas_interpret"
    )
