"""A memory is a file: what comes back, and what is refused."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import files, stream, tensors
from tests.laws.models import MODELS
from tests.train import test_storage

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = np.random.default_rng(0).integers(3, 259, (2, 35))


@pytest.fixture(
  scope="module", params=["transformer", "hope", "hope_attention_incontext"]
)
def model(request):
  net = MODELS[request.param]()
  return net, net.init(jax.random.key(0))


@pytest.fixture(scope="module")
def half(model, tmp_path_factory):
  """A file after 19 tokens, in the middle of a chunk."""
  net, params = model
  path = tmp_path_factory.mktemp("memory") / "half.memory"
  reader = stream.start(net, params, batch_size=2)
  reader.read(TOKENS[:, :19])
  stream.save_memory(
    path, net, params, reader.state, logits=reader.logits, about={"a": [1]}
  )
  return path


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_going_on_from_a_file_is_one_pass(model, half):
  net, params = model
  whole = stream.start(net, params, batch_size=2)
  whole.read(TOKENS[:, :19])
  first = whole.logits
  expected = whole.read(TOKENS[:, 19:])
  reader, manifest = stream.go_on(net, params, half)
  np.testing.assert_array_equal(reader.logits, first)
  np.testing.assert_array_equal(reader.read(TOKENS[:, 19:]), expected)
  equal(reader.state, whole.state)
  assert manifest["tokens_seen"] == [19, 19] and manifest["about"] == {"a": [1]}
  if net.arch == "hope":
    assert all(set(x) == {19 % 8} for x in manifest["clocks"].values())
  if net.arch == "hope_attention":
    # Micro-chunks of 5: three are closed, and four tokens are in the open one.
    assert manifest["clocks"] == {
      "buffer/phase_B": [4, 4],
      "levels/high/clock": [0, 0],
      "levels/mid/clock": [1, 1],
    }


def test_points_are_in_the_file(model, half, tmp_path):
  net, params = model
  reader, _ = stream.go_on(net, params, half)
  reader.mark("half", {"page": 7})
  reader.read(TOKENS[:, 19:])
  path = tmp_path / "points.memory"
  stream.save_memory(path, net, params, reader.state, points=reader.points)
  again, manifest = stream.go_on(net, params, path)
  assert manifest["points"] == {"half": {"seen": 19, "about": {"page": 7}}}
  equal(again.state, reader.state)
  again.roll_back("half")
  np.testing.assert_array_equal(again.read(TOKENS[:, 19:]), reader.logits)
  equal(again.state, reader.state)


_PROCESS = """
import sys, jax, numpy as np
from nl_jax import files, stream, tensors
from tests.laws.models import MODELS
from tests.train import test_storage
net = MODELS["hope"]()
params = net.init(jax.random.key(0))
tokens = np.load("tokens.npy")
if sys.argv[1] == "save":
  reader = stream.start(net, params, 2)
  reader.read(tokens[:, :19])
  stream.save_memory("half.memory", net, params, reader.state)
else:
  reader, _ = stream.go_on(net, params, "half.memory")
np.save(sys.argv[1], reader.read(tokens[:, 19:]))
"""


def test_in_a_new_process_bit_for_bit(tmp_path):
  np.save(tmp_path / "tokens.npy", TOKENS)
  for name in ("save", "load"):
    subprocess.run(
      [sys.executable, "-c", _PROCESS, name], check=True, cwd=tmp_path,
      timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
  np.testing.assert_array_equal(
    np.load(tmp_path / "save.npy"), np.load(tmp_path / "load.npy")
  )


def test_other_models_and_weights_are_refused(model, half):
  net, params = model
  other = MODELS["hope_linear" if net.arch != "hope" else "hope_static"]()
  with pytest.raises(ValueError, match="the memory of another model"):
    stream.load_memory(half, other, params)
  moved = jax.tree.map(lambda x: x + 1e-3, params)
  with pytest.raises(ValueError, match="learned with other weights"):
    stream.load_memory(half, net, moved)
  state, _, _ = stream.load_memory(half, net, moved, other_weights=True)
  assert state.position_B.tolist() == [19, 19]


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "text"])
def test_torn_files_are_one_sentence(model, half, tmp_path, damage):
  net, params = model
  content = half.read_bytes()
  path = tmp_path / "torn.memory"
  path.write_bytes({
    "cut": content[:-9], "half": content[: len(content) // 2],
    "empty": b"", "text": b"a poem, not a memory of it",
  }[damage])  # fmt: skip
  with pytest.raises(ValueError, match="not a memory file, or a torn one"):
    stream.load_memory(path, net, params)


def test_strangers_are_refused_and_not_written_over(model, half, tmp_path):
  from safetensors import flax as safetensors

  net, params = model
  state = net.init_state(params, 1)
  path = tmp_path / "weights.safetensors"
  path.write_bytes(safetensors.save({"w": jnp.ones(3)}))
  before = path.read_bytes()
  with pytest.raises(ValueError, match="a safetensors file but no memory"):
    stream.load_memory(path, net, params)
  with pytest.raises(ValueError, match="a safetensors file but no memory"):
    stream.save_memory(path, net, params, state)
  assert path.read_bytes() == before
  with pytest.raises(FileNotFoundError, match="no memory file"):
    stream.load_memory(tmp_path / "no", net, params)
  other = MODELS["hope_momentum"]()
  weights = other.init(jax.random.key(0))
  with pytest.raises(ValueError, match="holds the memory of another model"):
    stream.save_memory(half, other, weights, other.init_state(weights, 1))


def test_leaves_that_do_not_fit_are_named(model, half, tmp_path):
  from safetensors import flax as safetensors

  net, params = model
  leaves = safetensors.load(half.read_bytes())
  name = next(k for k in leaves if k.startswith("layers"))
  leaves[name] = leaves[name][:, :1]
  manifest = stream.read_manifest(half)
  path = tmp_path / "a"
  path.write_bytes(safetensors.save(leaves, {"nl_jax": json.dumps(manifest)}))
  with pytest.raises(ValueError, match=f"does not fit this model: {name} is"):
    stream.load_memory(path, net, params)


def rewritten(half, path, change):
  """The file with other arrays, as a program without seals writes it."""
  from safetensors import numpy as safetensors

  leaves, _ = tensors.read(half)
  manifest = stream.read_manifest(half)
  leaves = {k: np.asarray(change(x)) for k, x in leaves.items()}
  text = {"nl_jax": json.dumps(manifest)}
  path.write_bytes(safetensors.save(leaves, text))


@pytest.mark.parametrize(("change", "text"), [
  (lambda x: x * np.nan if x.dtype.kind == "f" else x, "is not finite"),
  (lambda x: x.astype(np.int64) if x.dtype.kind == "f" else x, "does not fit"),
  (lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x,
   "does not fit"),
  (lambda x: x.astype(np.int64) if x.dtype.kind == "i" else x, "does not fit"),
])  # fmt: skip
def test_numbers_that_are_no_memory_are_refused(
  model, half, tmp_path, change, text
):
  rewritten(half, tmp_path / "a", change)
  with pytest.raises(ValueError, match=text):
    stream.load_memory(tmp_path / "a", *model)


def test_every_turned_bit_is_found(model, half, tmp_path):
  """In the header's texts, in its table, and in the arrays."""
  content, path = half.read_bytes(), tmp_path / "a"
  header = int.from_bytes(content[:8], "little")
  places = [*range(8, 8 + header, 131), *range(8 + header, len(content), 2711)]
  fine = stream.load_memory(half, *model)[0]
  for place in [*places, len(content) - 1]:
    hurt = bytearray(content)
    hurt[place] ^= 2
    path.write_bytes(hurt)
    try:
      state, _, _ = stream.load_memory(path, *model)
    except ValueError as error:
      assert str(path) in str(error) and "\n" not in str(error)
    else:
      # Spaces after the header's last brace.
      assert place < 8 + header and content[place : place + 1] == b" "
      equal(state, fine)


def test_a_state_that_is_not_finite_is_not_kept(model, half, tmp_path):
  net, params = model
  state = stream.load_memory(half, net, params)[0]
  bad = lambda x: x * jnp.nan if x.dtype == jnp.float32 else x
  with pytest.raises(ValueError, match="is not finite"):
    stream.save_memory(tmp_path / "a", net, params, jax.tree.map(bad, state))
  assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_leaves_what_was_there(
  model, half, tmp_path
):
  net, params = model
  state = stream.load_memory(half, net, params)[0]
  path = tmp_path / "a.memory"
  path.write_bytes(half.read_bytes())
  with test_storage.limit() as (full, free):
    full()
    with pytest.raises(files.StorageError, match="a.memory cannot be written"):
      stream.save_memory(path, net, params, state)
    free()
  assert [p.name for p in tmp_path.iterdir()] == ["a.memory"]
  assert path.read_bytes() == half.read_bytes()


def test_a_place_is_checked_before_the_work(model, half, tmp_path):
  net, params = model
  state = stream.load_memory(half, net, params)[0]
  check = lambda path: stream.check_place(path, "--out", net, state)
  check(tmp_path / "new")
  check(half)
  (tmp_path / "poem").write_text("a poem")
  for path, text in (
    (tmp_path, "is a folder"), (tmp_path / "no" / "a", "there is no folder"),
    (tmp_path / "poem", "not a memory file"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=text):
      check(path)
  other = MODELS["hope_momentum"]()
  with pytest.raises(ValueError, match="holds the memory of another model"):
    stream.check_place(half, "--out", other, state)
  # A link that somebody left is not written through.
  (tmp_path / "precious").write_text("x")
  (tmp_path / ".new.tmp").symlink_to(tmp_path / "precious")
  stream.save_memory(tmp_path / "new", net, params, state)
  assert (tmp_path / "precious").read_text() == "x"


def test_states_at_their_start_are_finite():
  for name, make in MODELS.items():
    net = make()
    state = jax.jit(lambda p, net=net: net.init_state(p, 1, 8))
    params = jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype),
      jax.eval_shape(net.init, jax.random.key(0)),
    )
    for x in jax.tree.leaves(state(params)):
      assert np.isfinite(np.asarray(x, np.float64)).all(), name


def test_rows_are_reset_taken_and_cloned(model):
  net, params = model
  reader = stream.start(net, params, batch_size=2)
  reader.read(TOKENS[:, :13])
  kept = stream.clone(reader.state)
  one = stream.reset(net, params, kept, np.array([False, True]))
  fresh = net.init_state(params, 2, net.sequence_length)
  equal(stream.take(one, [0]), stream.take(kept, [0]))
  equal(stream.take(one, [1]), stream.take(fresh, [1]))
  twice = stream.take(kept, [1, 1, 0])
  equal(stream.take(twice, [0]), stream.take(kept, [1]))
  assert twice.position_B.shape == (3,)
  with pytest.raises(ValueError, match=r"must be bool \[2\]"):
    stream.reset(net, params, kept, np.array([True]))
  # The stream gives its buffers away; the clone stays.
  reader.read(TOKENS[:, 13:])
  assert kept.position_B.tolist() == [13, 13]


def test_no_gradient_flows_through_a_detached_state():
  net = MODELS["transformer"]()
  params = net.init(jax.random.key(0))

  @functools.partial(jax.jit, static_argnums=1)
  @jax.grad
  def gradient(params, cut):
    start = net.init_state(params, 2, 12)
    _, state, _ = net.apply(params, TOKENS[:, :8], start)
    state = stream.detach(state) if cut else state
    frozen = jax.lax.stop_gradient(params)
    return net.apply(frozen, TOKENS[:, 8:12], state)[0].sum()

  through = [
    max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient(params, cut)))
    for cut in (False, True)
  ]
  assert through[0] > 0 and through[1] == 0


def test_scores_are_the_loss_of_each_token(model):
  net, params = model
  reader = stream.start(net, params, batch_size=2)
  parts = [reader.score(TOKENS[:, a:b]) for a, b in ((0, 1), (1, 20), (20, 35))]
  nats = np.concatenate(parts, axis=1)
  logits, _, _ = jax.jit(net.apply)(params, TOKENS)
  chosen = jnp.take_along_axis(
    jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1
  )[..., 0]
  assert np.isnan(nats[:, 0]).all()
  np.testing.assert_allclose(nats[:, 1:], -chosen, atol=3e-5)
