"""Choice of matrices and of the fallback (docs/mathematics.md 10.9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from nl_jax import optim
from nl_jax.optim import _dims

_MATRIX = Dims(-2, -1)


def _params():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  return {
    "embed": {"kernel": shape(32, 8)},
    "blocks": {
      "mixer_norm": {"scale": shape(4, 8)},
      "mixer": {"wq": shape(4, 8, 8), "conv_q": shape(4, 4, 8)},
      "gate": {"kernel": shape(4, 8, 2), "bias": shape(4, 2)},
      "cms": {"high": {"w_gate": shape(4, 8, 16)}},
      "memory": {"start": shape(4, 2, 8, 8), "A_log": shape(4, 2)},
    },
    "RMSNorm_0": {"scale": shape(4, 8)},
    "lm_head": shape(8, 32),
    "head": shape(8, 32),
    "heads_out": shape(8, 32),
  }


def test_default_rules():
  got = optim.matrix_dims_from_paths(_params())
  matrices = {
    jax.tree_util.keystr(path)
    for path, spec in jax.tree_util.tree_leaves_with_path(
      got, is_leaf=lambda x: x is None or isinstance(x, Dims)
    )
    if spec is not None
  }
  assert matrices == {
    "['blocks']['mixer']['wq']",
    "['blocks']['gate']['kernel']",
    "['blocks']['cms']['high']['w_gate']",
    "['blocks']['memory']['start']",
    "['heads_out']",
  }
  assert got["blocks"]["mixer"]["wq"] == _MATRIX


def test_small_matrices_can_be_left_to_the_fallback():
  got = optim.matrix_dims_from_paths(_params(), min_dim=4)
  assert got["blocks"]["gate"]["kernel"] is None
  assert got["blocks"]["cms"]["high"]["w_gate"] == _MATRIX


_SHAPES = {
  # What public codes call their tables and heads.
  "transformer/wte/embedding": (100, 8),
  "wpe": (100, 8),
  "tok/weight": (9, 8),
  "tok_emb/weight": (9, 8),
  "pos_emb": (9, 8),
  "output/kernel": (8, 9),
  "params/output/kernel": (8, 9),
  "model/fc/weight": (8, 9),
  "classifier/kernel": (8, 9),
  "mlm_head/kernel": (8, 9),
  # Filters: of flax, of equinox, on an image, by name alone.
  "stage/a/kernel": (3, 3, 8, 8),
  "layers/0/weight": (8, 8, 5, 5),
  "entry/kernel": (14, 14, 3, 8),
  "patches/kernel": (4, 8, 8),
  # A vocabulary of any name, and a single output.
  "table": (50257, 768),
  "value/kernel": (8, 1),
}
_KERNELS = {
  "layers_0/attention/output/kernel": (8, 8),
  "encoder/layer/0/output/dense/kernel": (8, 8),
  "blocks/attn/out/kernel": (3, 8, 8),
  "multi_head/q": (8, 8),
  "token_mixing/Dense_0/kernel": (8, 8),
  "fc1/kernel": (8, 32),
  "experts/w_in": (2, 4, 8, 8),
  "memory/start": (2, 4, 16, 16),
}


def test_names_and_shapes_of_public_codes():
  tree = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in (_SHAPES | _KERNELS).items()
  }
  got = optim.matrix_dims_from_paths(tree)
  assert {name for name, spec in got.items() if spec} == set(_KERNELS)
  said = optim.explain_matrices(tree)
  assert said["experts/w_in"] == "8 matrices 8 x 8"
  assert said["fc1/kernel"] == "matrix 8 x 32"
  assert said["wpe"] == "other: its name has 'wpe'"
  assert said["table"] == "other: a table by its shape (50257, 768)"
  assert said["value/kernel"] == "other: a side of 1 is below 2"
  assert optim.explain_matrices(
    {"a": tree["stage/a/kernel"], "b": jnp.ones(3)}, by_shape=False
  ) == {"a": "9 matrices 8 x 8", "b": "other: rank 1"}


def test_dense_general_kernels():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  tree = {
    "query": {"kernel": shape(3, 8, 2, 4), "bias": shape(3, 2, 4)},
    "out": {"kernel": shape(3, 2, 4, 8)},
    "mlp": {"kernel": shape(3, 8, 16)},
  }
  got = optim.matrix_dims_from_paths(tree, rules=optim.DENSE_GENERAL_RULES)
  assert got["query"] == {"kernel": Dims(-3, (-2, -1)), "bias": None}
  assert got["out"]["kernel"] == Dims((-3, -2), -1)
  assert got["mlp"]["kernel"] == _MATRIX


def test_dense_general_is_one_matrix_of_its_heads():
  x = jax.random.normal(jax.random.key(0), (8, 2, 4))
  tx = optim.scale_by_m3(
    alpha=None, second_moment=None, dims=Dims(-3, (-2, -1))
  )
  got, _ = tx.update(x, tx.init(x))
  want = optim.orthogonalize(x.reshape(8, 8)).reshape(8, 2, 4)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_leaves_without_a_spec_take_adamw():
  p = {"w": jnp.ones((4, 4)), "norm": {"scale": jnp.ones((3, 4))}}
  tx = optim.m3(
    1e-2, fallback=optim.adam_memory(1e-2, b2=0.95, weight_decay=0.1)
  )
  adamw = optax.adamw(1e-2, b2=0.95, weight_decay=0.1)
  state, other = tx.init(p), adamw.init(p)
  for t in range(4):
    g = jax.tree.map(lambda x, t=t: jnp.cos(x * t + 1), p)
    u, state = tx.update(g, state, p)
    v, other = adamw.update(g, other, p)
    np.testing.assert_allclose(u["norm"]["scale"], v["norm"]["scale"], 1e-5)
  slots = sum(x.size for x in jax.tree.leaves(state) if x.ndim == 2)
  assert slots == 5 * 16 + 2 * 12


def test_another_fallback():
  p = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
  for make in (optim.m3, optim.deep_momentum):
    tx = make(1e-2, fallback=optax.sgd(0.5))
    u, _ = tx.update(p, tx.init(p), p)
    np.testing.assert_allclose(u["b"], -0.5)


def test_weight_decay_takes_masks():
  p = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "b": jnp.ones(4)}
  zero = jax.tree.map(jnp.zeros_like, p)
  masks = (
    {"w": True, "v": False, "b": False},
    lambda p: jax.tree_util.tree_map_with_path(
      lambda path, _: path[0].key == "w", p
    ),
  )
  for mask in masks:
    for make in (optim.m3, optim.delta_momentum, optim.deep_momentum):
      tx = make(0.1, weight_decay=0.5, mask=mask)
      u, _ = tx.update(zero, tx.init(p), p)
      np.testing.assert_allclose(u["w"], -0.05, rtol=1e-6)
      assert not u["v"].any() and not u["b"].any()


@pytest.mark.parametrize(
  ("rms", "scale"), [(0.2, 0.2 * 8**0.5), (None, 2**0.5)]
)
def test_scale_by_shape(rms, scale):
  tx = optim.scale_by_shape({"w": _MATRIX, "b": None}, rms)
  p = {"w": jnp.ones((3, 4, 8)), "b": jnp.ones(4)}
  u, _ = tx.update(p, tx.init(p))
  np.testing.assert_allclose(u["w"], scale, rtol=1e-6)
  np.testing.assert_allclose(u["b"], 1.0)


def test_norms_are_those_of_the_matrices():
  x = jax.random.normal(jax.random.key(0), (3, 4, 5))
  got = _dims.norm(x, Dims(0, 2))
  want = np.sqrt((np.asarray(x) ** 2).sum((0, 2), keepdims=True))
  np.testing.assert_allclose(got, want, rtol=1e-5)
