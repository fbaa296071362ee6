"""The config groups of the rules: every option arrives, no other is taken."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import optim
from nl_jax.train import rules


def build(name, **values):
  return rules.build(
    name,
    rules.filled(name, values),
    optax.constant_schedule(0.1),
    0.1,
    weight_decay=0.0,
    mask=None,
    dims=optim.matrix_dims_from_paths,
  )


@pytest.mark.parametrize("name", rules.RULES)
def test_a_group_has_the_options_of_the_factory_with_its_defaults(name):
  known = rules.options(name)
  recipe = {
    "learning_rate", "weight_decay", "mask", "dims", "fallback", "vector_rule",
    "ns", "dtypes",
  }  # fmt: skip
  parameters = inspect.signature(rules.RULES[name].factory).parameters
  assert set(parameters) - set(known) <= recipe
  for key, field in known.items():
    assert field.remark, key
    assert field.bounds.takes(field.default), key
    if key in parameters and key != "memory":
      default = parameters[key].default
      assert field.default in (default, "none" if default is None else 0, 0)


GROUPED = {
  "coeffs": ("ns", "coeffs"), "ns_eps": ("ns", "eps"),
  "ns_dtype": ("ns", "dtype"), "mu_dtype": ("dtypes", "m1"),
  "nu_dtype": ("dtypes", "nu"), "slow_dtype": ("dtypes", "slow"),
  "o2_dtype": ("dtypes", "o2"),
}  # fmt: skip
CHANGES = {
  "adamw": dict(b1=0.5, b2=0.5, eps=0.1, nesterov=True),
  "adam_memory": dict(
    b1=0.5, b2=0.5, eps=0.1, ridge=0.1, accumulate="sum",
    bias_correction=False, target="square", mu_dtype="bfloat16",
  ),
  "deep_momentum": dict(
    alpha=0.5, inner_lr=0.9, target_decay=0.1, memory="linear", hidden=8.0,
    depth=1, activation="tanh", residual=False, seed=1, inner_step="gd",
    loss="dot", target="ones", read="pre", output="orthogonalize",
    decay_layers="all", fallback_learning_rate=0.5, fallback_b1=0.1,
    fallback_b2=0.1, fallback_eps=0.1,
  ),
  "delta_momentum": dict(
    alpha=0.5, eta_decay=0.1, eta=0.5, decay="implicit", granularity="element",
    side="output", key="raw", preconditioner="diag", eps=100.0,
    mu_dtype="bfloat16",
  ),
  "m3": dict(
    b1=0.5, b2=0.5, b3=0.1, alpha=0.5, eps=0.1, ns_steps=2, slow_every=1,
    consistent_rms=0.0, second_moment="grad", bias_correction=False,
    nesterov=True, coeffs="cubic", ns_eps=1.0, slow_read="same",
    fallback_learning_rate=0.5, fallback_b1=0.1, fallback_b2=0.1,
    fallback_eps=0.1, mu_dtype="bfloat16", nu_dtype="bfloat16",
    slow_dtype="bfloat16", o2_dtype="bfloat16",
  ),
  "muon": dict(
    b1=0.5, ns_steps=2, consistent_rms=0.5, nesterov=True, coeffs="cubic",
    ns_eps=1.0, ns_dtype="bfloat16", fallback_learning_rate=0.5,
    fallback_b1=0.1, fallback_b2=0.1, fallback_eps=0.1,
  ),
}  # fmt: skip


def moved(name, **values):
  """Parameters after three steps."""
  key = jax.random.key(0)
  p = {"w": jax.random.normal(key, (4, 6)), "b": jnp.ones(3)}
  tx = build(name, **values)
  state, update = tx.init(p), jax.jit(tx.update)
  for i in range(3):
    g = jax.tree.map(lambda x, i=i: jnp.cos(7 * x + i * i), p)
    updates, state = update(g, state, p)
    p = optax.apply_updates(p, updates)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)])


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_arrives(name, monkeypatch):
  rule, seen = rules.RULES[name], {}

  @functools.wraps(rule.factory)
  def factory(rate, **given):
    seen.update(given)
    return optax.identity()

  monkeypatch.setitem(rules.RULES, name, rule._replace(factory=factory))
  fallbacks = []

  @functools.wraps(rules.adamw)
  def adamw(rate, **given):
    fallbacks.append((float(rate(0)), given))

  monkeypatch.setattr(rules, "adamw", adamw)
  built = {"memory", "preconditioner", "hidden", "depth", "activation",
           "residual", "seed"}  # fmt: skip
  build(name)
  before = dict(seen)
  for key, value in CHANGES[name].items():
    is_part = key in built - {"preconditioner"}
    beside = {"memory": "mlp"} if is_part else {}
    build(name, **beside | {key: value})
    rate, given = fallbacks[-1] if fallbacks else (0.0, {})
    if key == "fallback_learning_rate":
      assert rate == pytest.approx(value)
    elif key.startswith("fallback_"):
      assert given[key.removeprefix("fallback_")] == value
    elif key in built:
      changed = "preconditioner" if key == "preconditioner" else "memory"
      assert seen[changed] != before[changed]
    elif key == "consistent_rms":
      assert seen[key] == (value or None)
    elif key in GROUPED and key not in seen:
      group, part = GROUPED[key]
      assert getattr(seen[group], part) == value, key
      assert getattr(before[group], part) != value, key
    else:
      assert seen[key] == value and before[key] != value, key


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_learns_with_every_option_changed(name):
  changes = dict(CHANGES[name])
  if name == "deep_momentum":
    changes["memory"] = "mlp"
  if name == "delta_momentum":
    changes |= dict(side="input", eps=1e-8)
  before, after = moved(name), moved(name, **changes)
  assert np.isfinite(after).all()
  assert np.abs(after - before).max() > 1e-4


def test_none_and_0_stand_for_none():
  values = rules.filled("m3", dict(alpha=0.0, second_moment="none"))
  muon = moved("muon")
  got = moved("m3", **dict(alpha=0.0, second_moment="none"))
  np.testing.assert_allclose(got, muon, rtol=1e-6)
  assert values["nu_dtype"] == "none"


@pytest.mark.parametrize(("name", "values", "sentence"), [
  ("m3", {"b4": 0.1}, "optim.m3 has no field b4; it has b1, b2, b3"),
  ("m3", {"b1": 1.0}, "optim.m3.b1 must be a number from 0 to below 1"),
  ("m3", {"second_moment": "adam"}, "must be one of ortho, grad, none"),
  ("m3", {"slow_every": 0}, "optim.m3.slow_every must be a whole number"),
  ("m3", {"alpha": 0.0, "b3": 0.5},
   "optim.m3.b3=0.5 is not read with optim.m3.alpha=0.0"),
  ("muon", {"alpha": 0.5}, "optim.muon has no field alpha"),
  ("deep_momentum", {"memory": "linear", "hidden": 0.5},
   "optim.deep_momentum.hidden=0.5 is not read with "
   "optim.deep_momentum.memory=linear"),
  ("adamw", {"alpha": 0.9}, "optim.adamw has no field alpha; it has b1"),
])  # fmt: skip
def test_what_a_rule_does_not_read(name, values, sentence):
  with pytest.raises(ValueError) as found:
    rules.filled(name, values)
  assert sentence in str(found.value)


def test_a_field_of_a_rule_that_is_not_chosen():
  group = {"name": "muon", "reduce": "mean"} | {
    name: {k: x.default for k, x in rules.options(name).items()}
    for name in rules.RULES
  }
  assert set(rules.chosen(group)) == {"name", "reduce", "muon"}
  group["m3"]["b1"] = 0.7
  with pytest.raises(ValueError) as found:
    rules.chosen(group)
  assert str(found.value) == (
    "nothing reads optim.m3.b1=0.7: the rule is optim.name='muon'; set "
    "optim.name=m3, or leave it"
  )


def test_groups_of_runs_of_before():
  old = dict(learning_rate=0.1, b1=0.8, b2=0.7, eps=1e-6)
  adamw = rules.upgraded(old | {"name": "adamw"})
  assert adamw["adamw"] == dict(b1=0.8, b2=0.7, eps=1e-6, nesterov=False)
  assert adamw["learning_rate"] == 0.1 and "b1" not in adamw
  m3 = rules.upgraded(old | {"name": "m3"})["m3"]
  assert m3["fallback_b1"] == 0.8 and m3["fallback_eps"] == 1e-6
  # What it was before anyone could say it.
  assert m3["b1"] == 0.95 and m3["slow_every"] == 100
  # They never were of these.
  assert rules.upgraded(old | {"name": "adam_memory"})["adam_memory"]["b1"] == (
    0.9
  )
  assert rules.upgraded(adamw) == adamw
