"""What each mistake in an optimizer's arguments raises."""

import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

from nl_jax import optim

_P = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


@pytest.mark.parametrize(
  ("make", "kw", "match"),
  [
    (optim.scale_by_m3, {"accumulate": "max"}, "accumulate must be one of"),
    (optim.scale_by_m3, {"second_moment": "x"}, "'ortho', 'grad', None"),
    (optim.scale_by_m3, {"chunk_reduce": "max"}, "chunk_reduce must be"),
    (optim.scale_by_m3, {"slow_read": "now"}, "slow_read must be"),
    (
      optim.scale_by_m3,
      {"ns": optim.NewtonSchulz("quintic")},
      "coeffs must be one of",
    ),
    (optim.scale_by_m3, {"ns": optim.NewtonSchulz(((1.0, 2.0),))}, r"\(k, 3\)"),
    (optim.scale_by_m3, {"ns_steps": -1}, "ns_steps must be >= 0"),
    (optim.scale_by_m3, {"accumulate": "sum"}, "second_moment='ortho'"),
    (
      optim.scale_by_m3,
      {"accumulate": "sum", "second_moment": None, "nesterov": True},
      "nesterov",
    ),
    (optim.scale_by_delta_momentum, {"decay": "exp"}, "decay must be"),
    (optim.scale_by_delta_momentum, {"granularity": "row"}, "granularity must"),
    (optim.scale_by_delta_momentum, {"side": "left"}, "side must be"),
    (optim.scale_by_delta_momentum, {"key": "unit"}, "key must be"),
    (optim.scale_by_delta_momentum, {"decay": "clip"}, "'tensor' or 'element'"),
    (optim.scale_by_feature_momentum, {"feature": "exp"}, "feature must be"),
    (optim.scale_by_feature_momentum, {"normalize": "l2"}, "normalize must"),
    (optim.left_gram_preconditioner, {"side": "left"}, "side must be"),
    (optim.scale_by_deep_momentum, {"readout": "state"}, "LinearMemory"),
    (optim.scale_by_deep_momentum, {"inner_step": "adam"}, "inner_step must"),
    (optim.scale_by_deep_momentum, {"loss": "l1"}, "loss must be"),
    (optim.scale_by_deep_momentum, {"target": "zero"}, "target must be"),
    (optim.scale_by_deep_momentum, {"readout": "all"}, "readout must be"),
    (optim.scale_by_deep_momentum, {"read": "mid"}, "read must be"),
    (optim.scale_by_deep_momentum, {"output": "ns"}, "output must be"),
    (optim.scale_by_deep_momentum, {"decay_layers": "no"}, "decay_layers"),
    (optim.scale_by_deep_momentum, {"vector_rule": "adam"}, "vector_rule"),
    (optim.MLPMemory, {"activation": "cube"}, "activation must be"),
    (optim.MLPMemory, {"depth": 3}, "depth must be"),
    (optim.MLPMemory, {"hidden": -1}, "hidden must be"),
    (optim.scale_by_adam_memory, {"target": "cube"}, "target must be"),
    (optim.scale_by_adam_memory, {"accumulate": "max"}, "accumulate must"),
    (optim.scale_by_adagrad_memory, {"granularity": "row"}, "granularity"),
    (optim.scale_by_adagrad_memory, {"side": "up"}, "side must be"),
  ],
)
def test_at_construction(make, kw, match):
  with pytest.raises(ValueError, match=match):
    make(**kw)


def test_steps_must_be_an_integer():
  with pytest.raises(TypeError, match="must be an int, got 5.0"):
    optim.scale_by_m3(ns_steps=5.0)


@pytest.mark.parametrize(
  "make",
  [
    lambda: optim.m3(1e-3, weight_decay=0.1),
    lambda: optim.delta_momentum(1e-3, weight_decay=0.1),
    lambda: optim.deep_momentum(1e-3, weight_decay=0.1),
    lambda: optim.adam_memory(1e-3, weight_decay=0.1),
    lambda: optim.delta_gradient(1e-3),
    lambda: optim.scale_by_delta_gradient(),
  ],
)
def test_params_are_needed(make):
  tx = make()
  with pytest.raises(ValueError, match="params"):
    tx.update(_P, tx.init(_P), input_gram=_P)


_RULES = [
  optim.scale_by_m3,
  optim.scale_by_delta_momentum,
  optim.scale_by_deep_momentum,
]


@pytest.mark.parametrize("make", _RULES)
@pytest.mark.parametrize(
  ("dims", "match"),
  [
    (Dims(-2, -1), r"rank >= 2, got shape \(4,\) at \['b'\]"),
    ({"w": Dims(0, 0), "b": None}, r"overlap: shape \(3, 4\) at \['w'\]"),
    ({"w": Dims(0, 2), "b": None}, "out of range"),
    ({"v": Dims(0, 1)}, "prefix tree"),
    (lambda p: {"w": 3, "b": None}, "MuonDimensionNumbers or None"),
  ],
)
def test_specs_at_init(make, dims, match):
  with pytest.raises(ValueError, match=match):
    make(dims=dims).init(_P)


@pytest.mark.parametrize(
  "make", [*_RULES, optim.scale_by_adam_memory, optim.scale_by_delta_gradient]
)
def test_integer_leaves(make):
  with pytest.raises(TypeError, match=r"int32 of shape \(3,\).*optax.masked"):
    make().init({"w": jnp.ones((3, 4)), "n": jnp.ones(3, jnp.int32)})


def test_complex_leaves_are_refused_where_they_have_no_meaning():
  p = jnp.ones((3, 4), jnp.complex64)
  for tx in (
    optim.scale_by_deep_momentum(),
    optim.scale_by_delta_momentum(decay="implicit"),
    optim.scale_by_delta_momentum(decay="prox"),
  ):
    with pytest.raises(TypeError, match="complex64"):
      tx.init(p)


def test_linear_read_out_needs_matrices():
  tx = optim.scale_by_deep_momentum(
    memory=optim.LinearMemory(), readout="apply", vector_rule="mlp"
  )
  with pytest.raises(ValueError, match=r"matrices, got shape \(4,\) at.*'b'"):
    tx.init(_P)


def test_a_matrix_may_be_required():
  optim.m3(1e-3, require_matrix=True).init(_P)
  with pytest.raises(ValueError, match="no leaf is a matrix"):
    optim.m3(1e-3, require_matrix=True).init({"b": jnp.ones(4)})


@pytest.mark.parametrize(
  ("gram", "match"),
  [
    (None, "input_gram=tree"),
    ({"w": jnp.ones((4, 4)), "b": None}, r"must be \(3, 3\)"),
  ],
)
def test_gram_of_the_inputs(gram, match):
  tx = optim.scale_by_delta_gradient()
  with pytest.raises(ValueError, match=match):
    tx.update(_P, tx.init(_P), _P, input_gram=gram)


def test_feature_maps_keep_the_shape():
  tx = optim.scale_by_feature_momentum(lambda x: x[..., :1])
  with pytest.raises(ValueError, match=r"keep the shape.*\['b'\]"):
    tx.update(_P, tx.init(_P))


def test_eigendecompositions_are_bounded():
  wide = {"w": jnp.ones((2, 1025))}
  for tx in (
    optim.left_gram_preconditioner(side="output"),
    optim.scale_by_adagrad_memory(granularity="matrix"),
  ):
    with pytest.raises(ValueError, match="size 1025 at.*more than 1024"):
      tx.init(wide)
