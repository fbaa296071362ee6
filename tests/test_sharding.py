"""The mesh, the table, and one model on many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.cli import named
from nl_jax import build, sharding
from nl_jax.aot import hlo
from nl_jax.memory import self_modifying
from nl_jax.models import cms, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.train import optimizer, step
from nl_jax.train import state as state_lib

T, B = 16, 8
CMS = cms.Options(("high", "low"), (32, 32), (T * B, 2 * T * B))
MEMORY = self_modifying.Options(chunk_memory=8, chunk_gen=8)


def model(arch: str = "hope", **change) -> lm.LanguageModel:
  shape = dict(
    arch=arch,
    width=32,
    layers=2,
    heads=4,
    head_dim=8,
    vocab_size=64,
    sequence_length=T,
    cms=CMS,
    mixer=MEMORY if arch == "hope" else None,
  )
  return lm.LanguageModel(**(shape | change))


MODELS = {
  "hope": model(),
  "hope_linear": model(
    mixer=self_modifying.Options(
      memory="linear",
      momentum="ema",
      value_source="plain",
      generators=self_modifying.GeneratorOptions(value_source="plain"),
    )
  ),
  "hope_channel": model(mixer=self_modifying.Options(gate_shape="channel")),
  "hope_attention": model("hope_attention"),
  "independent": model(
    "hope_attention",
    cms=cms.Options(("a", "b"), (32, 32), (0, 0), variant="independent"),
  ),
  "transformer": model("transformer", cms=cms.Options(widths=(64,))),
  # So narrow that the chain is split by tokens.
  "narrow": model(
    "hope_attention",
    cms=cms.Options(("a", "b", "c"), (4, 4, 4), (0, 0, 0)),
  ),
  "incontext": incontext.InContextModel(
    model("hope_attention", mixer=attention.Options(window=8)),
    incontext.Options(chunks=(4,), rates=(0.3,), rule="momentum"),
  ),
}


def batch(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 64, (B, T + 1)).astype(np.int32)
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.ones((B, T), np.float32),
    "segment_ids": np.ones((B, T), np.int32),
  }


def test_mesh_takes_what_is_left():
  assert dict(sharding.mesh().shape)["fsdp"] == 8
  mesh = sharding.mesh(replica=2, fsdp=-1, tensor=2)
  assert tuple(mesh.shape.values()) == (2, 2, 1, 2)
  assert mesh.axis_names == sharding.AXES
  kinds = set(mesh.axis_types)
  assert kinds == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  "sizes",
  [
    dict(fsdp=3),
    dict(fsdp=-1, tensor=-1),
    dict(fsdp=0),
    dict(fsdp=-2),
    dict(replica=16),
    dict(tensor=3),
  ],
)
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(ValueError, match="mesh"):
    sharding.mesh(**sizes)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_every_parameter(name):
  table = MODELS[name].leaves()
  params = jax.eval_shape(MODELS[name].init, jax.random.key(0))
  made = jax.tree_util.tree_leaves_with_path(params)
  shapes = {sharding.path_name(path): leaf.shape for path, leaf in made}
  assert shapes == {path: leaf.shape for path, leaf in table.items()}
  for path, leaf in table.items():
    assert len(leaf.axes) == len(leaf.shape), path
    assert set(leaf.axes) <= set(sharding.LOGICAL), path


@pytest.mark.versions
@pytest.mark.parametrize(
  "name", ["hope", "hope_linear", "transformer", "incontext"]
)
def test_every_state_has_one_rule(name):
  m = MODELS[name]
  params = jax.eval_shape(m.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: m.init_state(p, B), params)
  mesh = sharding.mesh(replica=2, fsdp=2, tensor=2)
  shardings = sharding.sequence_shardings(state, mesh)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  for (path, _), s in zip(leaves, jax.tree.leaves(shardings)):
    lead = P(("replica", "fsdp"))
    layered = sharding.path_name(path).startswith("layers/")
    assert tuple(s.spec)[layered] == lead[0]
  if name == "hope":
    spec = shardings.layers.memory.memory.w["w_in"].spec
    assert spec == P(None, ("replica", "fsdp"), "tensor", None, None)


LARGEST = [n for n in named.config_names() if n.endswith("_1b3")]


@pytest.mark.parametrize("name", LARGEST)
def test_every_config_is_laid_out(name):
  # Parameters, the state of sequences and every slot, by shapes alone: heads
  # and widths of the paper's size divide by `tensor`.
  config = build.resolve(named.load_config(name))
  net, mesh = build.model(config), sharding.mesh(2, 2, 1, 2)
  params = jax.eval_shape(net.init, jax.random.key(0))
  shardings = sharding.param_shardings(params, net.axes(), mesh)
  whole = sharding.large_replicated(params, shardings)
  assert not [path for path, size in whole if size > 2**24]
  assert any("tensor" in s.spec for s in jax.tree.leaves(shardings))
  state = jax.eval_shape(lambda p: net.init_state(p, B, 64), params)
  sharding.sequence_shardings(state, mesh)
  by_path = {
    sharding.path_name(path): s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(shardings)
  }
  tx = build.make_optimizer(config, net).tx
  slots = jax.eval_shape(tx.init, params)
  placed = sharding.state_shardings(
    tx, params, shardings, sharding.replicated(mesh)
  )
  for (path, leaf), s in zip(
    jax.tree_util.tree_leaves_with_path(slots), jax.tree.leaves(placed)
  ):
    full = "/" + sharding.path_name(path)
    same = [p for p in by_path if full.endswith("/" + p)]
    # A parameter's path may end another's: the longest is meant.
    expected = by_path[max(same, key=len)] if same else P()
    assert s.spec == expected and (same or not leaf.shape), full


def test_heads_that_do_not_divide_say_so():
  config = build.resolve(named.load_config("gated_deltanet_tiny:smoke"))
  net, mesh = build.model(config), sharding.mesh(fsdp=4, tensor=2)
  params = jax.eval_shape(net.init, jax.random.key(0))
  with pytest.raises(ValueError, match="'heads' of size 3 must be a multiple"):
    sharding.param_shardings(params, net.axes(), mesh)


def test_learned_memories_of_an_optimizer_are_split():
  m, mesh = MODELS["hope"], sharding.mesh(2, 2, 1, 2)
  made = optimizer.make(
    m, steps=10, tokens_per_step=B * T, learning_rate=1e-2,
    name="deep_momentum",
  )  # fmt: skip
  like = state_lib.abstract(m, made.tx, mesh)
  found = {
    sharding.path_name(path[-4:]): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(like["opt"])
    if sharding.path_name(path[-1:]) in sharding.LEARNED
  }
  assert found["blocks/mixer/w_q/w_in"] == P(None, None, "fsdp")
  assert found["blocks/mixer/w_q/w_out"] == P(None, "fsdp", None)
  # The start of a memory is a parameter of that name, not a memory of one.
  assert found["mixer/memory/memory/w_in"][1] == "tensor"


def test_unknown_parameter_and_wrong_rank():
  axes, mesh = {"embed": ("vocab", "embed")}, sharding.mesh()
  for name, rank in ("bias", 2), ("embed", 3):
    params = {name: jnp.zeros((8,) * rank)}
    with pytest.raises(ValueError, match=f"{name}: .* of rank {rank}"):
      sharding.param_shardings(params, axes, mesh)


def test_axis_that_does_not_divide():
  net = model("transformer", cms=cms.Options(widths=(30,)))
  params = jax.eval_shape(net.init, jax.random.key(0))
  mesh = sharding.mesh(fsdp=2, tensor=4)
  with pytest.raises(ValueError, match="'mlp' of size 30 .* nearest: 32"):
    sharding.param_shardings(params, net.axes(), mesh)


def test_batch_that_does_not_divide():
  mesh = sharding.mesh(fsdp=4, tensor=2)
  sharding.check_batch(mesh, 16, T, 2)
  with pytest.raises(ValueError, match="4 \\* 2, got 12; nearest: 8 or 16"):
    sharding.check_batch(mesh, 12, T, 2)
  mesh = sharding.mesh(fsdp=2, sequence=4)
  with pytest.raises(ValueError, match="multiple of mesh.sequence=4"):
    sharding.check_batch(mesh, 8, 6)


def test_constrain_is_nothing_without_a_mesh():
  x = jnp.ones((8, 4))
  assert sharding.constrain(x, "batch", "act_embed") is x
  with jax.set_mesh(sharding.mesh()):
    y = jax.jit(lambda x: sharding.constrain(x, "batch", "act_embed"))(x)
    expected = jax.NamedSharding(sharding.mesh(), sharding.spec("batch", None))
  assert y.sharding.is_equivalent_to(expected, 2)
  with jax.set_mesh(jax.make_mesh((8,), ("other",))):
    assert sharding.constrain(x, "batch", "act_embed") is x


def prepared(m: lm.LanguageModel, mesh: jax.sharding.Mesh):
  made = optimizer.make(m, steps=10, tokens_per_step=B * T, learning_rate=1e-2)
  like = state_lib.abstract(m, made.tx, mesh)
  return made, like, state_lib.create(m, made.tx, like, seed=0)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["hope", "transformer"])
def test_optimizer_slots_lie_as_their_parameters(name):
  mesh = sharding.mesh(fsdp=4, tensor=2)
  m = MODELS[name]
  _, like, state = prepared(m, mesh)
  specs = {
    sharding.path_name(path): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(like["params"])
  }
  found = 0
  for path, x in jax.tree_util.tree_leaves_with_path(like["opt"]):
    full = sharding.path_name(path)
    same = [p for p in specs if full.endswith("/" + p)]
    if not same:
      assert x.shape == () and x.sharding.spec == P()
      continue
    assert x.sharding.spec == specs[max(same, key=len)]
    found += 1
  assert found >= 2 * len(specs)
  same = lambda a, b: a.sharding == b.sharding
  assert all(jax.tree.leaves(jax.tree.map(same, state, like)))
  sharded = [s for s in specs.values() if any(axis for axis in s)]
  assert len(sharded) > len(specs) // 2


def two_steps(m: lm.LanguageModel, mesh: jax.sharding.Mesh):
  made, like, state = prepared(m, mesh)
  with jax.set_mesh(mesh):
    run = step.make(m, made.tx, made.schedule, made.labels, accumulate=2)
    compiled = step.compiled(run, like, mesh, B, T)
    put = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
    seen = []
    for seed in range(2):
      state, metrics = compiled(state, jax.tree.map(put, batch(seed)))
      seen.append(jax.device_get(metrics))
  return jax.device_get(state["params"]), seen


@pytest.mark.versions
@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("hope", dict(replica=2, fsdp=2, tensor=2)),
    ("incontext", dict(replica=2, fsdp=2, tensor=2)),
    ("transformer", dict(fsdp=4, tensor=2)),
    ("transformer", dict(fsdp=2, sequence=2, tensor=2)),
    ("narrow", dict(fsdp=2, sequence=2, tensor=2)),
  ],
)
def test_eight_devices_are_one(name, sizes):
  # Two micro-batches of four rows over the mesh's batch axes.
  params, metrics = two_steps(MODELS[name], sharding.mesh(**sizes))
  one = sharding.mesh(devices=jax.devices()[:1])
  expected, alone = two_steps(MODELS[name], one)
  for a, b in zip(alone, metrics):
    for key in a:
      np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5)
  # Adam divides gradients near zero by their size: compare loosely.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    expected,
    params,
  )


def smoke(name: str, **memory) -> lm.LanguageModel:
  """The test size of a config, in short sequences of four heads."""
  config = build.resolve(named.load_config(f"{name}_tiny:smoke"))
  with config.unlocked():
    config.data.sequence_length = 2 * T
    config.model.layers = 2
    config.model.mixer.update(memory)
  return build.model(config)


WALKS = {
  "hope": {},
  "hope_linear": dict(momentum="ema", objective="l2"),
  "memora": {},
  "retnet": {},
  "titans_lmm": {},
  "titans_mag": {},
  "ttt_mlp": {},
}


@pytest.mark.parametrize("name", WALKS)
def test_loops_over_chunks_have_no_collective(name):
  # Forward and backward: neither fast weights nor the gradients of what they
  # start from leave a device while a sequence is walked.
  counts = gradient_of_stack(smoke(name, **WALKS[name]), 2 * T)
  # The loops over layers, chunks in groups and chunks, and back.
  assert len(counts.loops) >= 4, counts.loops
  assert {c.axes for c in counts.collectives} >= {"tensor", "fsdp"}
  assert not [c for c in counts.collectives if "nested" in c.place]


# Three tokens of convolutions; gradients of weights.
_AROUND = {"collective-permute", "all-reduce"}


@pytest.mark.parametrize(
  ("name", "inside", "around"),
  [
    ("hope_linear", {"collective-permute"}, _AROUND),
    # A gather of summaries a walk, and back.
    ("gated_deltanet", set(), _AROUND | {"all-gather", "reduce-scatter"}),
  ],
)
def test_loops_over_rows_send_fast_weights_alone(name, inside, around):
  mesh = sharding.mesh(fsdp=2, sequence=4)
  counts = gradient_of_stack(smoke(name), 128, mesh)
  nested = [c for c in counts.collectives if "nested" in c.place]
  assert {c.kind for c in nested} == inside
  assert all(c.axes == "sequence" for c in nested)
  # Over the steps of the rows, not over their chunks.
  assert all(c.place.endswith("in 2 nested loops") for c in nested)
  of_layers = [
    c for c in counts.collectives
    if c.axes == "sequence" and c.place.endswith("in a loop")
  ]  # fmt: skip
  assert {c.kind for c in of_layers} <= around


def gradient_of_stack(
  m: lm.LanguageModel, length: int, mesh: jax.sharding.Mesh | None = None
) -> hlo.Counts:
  """What the layers and their gradients send between eight devices."""
  mesh = mesh or sharding.mesh(2, 2, 1, 2)
  blocks = jax.eval_shape(m.init, jax.random.key(0))["blocks"]
  shardings = sharding.param_shardings({"blocks": blocks}, m.axes(), mesh)
  shardings = shardings["blocks"]
  blocks = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    blocks,
    shardings,
  )
  by_batch = sharding.batch_sharding(mesh)
  like = lambda dtype, *shape: jax.ShapeDtypeStruct(
    shape, dtype, sharding=by_batch
  )
  x, ids = like(jnp.float32, B, length, m.width), like(jnp.int32, B, length)
  loss = lambda blocks, x, ids: m.stack(blocks, x, None, ids)[0].sum()
  with jax.set_mesh(mesh):
    run = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(shardings, by_batch))
    text = run.lower(blocks, x, ids).compile().as_text()
  return hlo.count(text, dict(mesh.shape))


def test_a_chain_of_levels_waits_no_more_than_one_block():
  def sums(name: str) -> int:
    counts = gradient_of_stack(MODELS[name], T)
    return sum(
      c.count
      for c in counts.collectives
      if c.kind == "all-reduce" and c.axes == "tensor" and "loop" in c.place
    )

  # 5 a layer: the mixer's and the block's forward and backward, and the
  # mixer's recomputed; by widths, three levels have 11.
  assert sums("narrow") <= sums("transformer") == 5 * 2


def test_large_replicated_leaves_are_named():
  mesh = sharding.mesh()
  tree = {"a": jax.ShapeDtypeStruct((2**18,), jnp.float32), "b": jnp.ones(3)}
  shardings = jax.tree.map(lambda _: sharding.replicated(mesh), tree)
  assert list(sharding.large_replicated(tree, shardings)) == [("a", 2**20)]
