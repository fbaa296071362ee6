"""The runner of levels: its two forms, an independent loop, its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import levels, optim

WIDTH = 3
PERIODS = (2, 4, 12)


def reptile(start, params, gradient):
  del gradient
  start = jax.tree.map(lambda a, b: a + 0.3 * (b - a), start, params)
  return start, start


def fomaml(start, params, gradient):
  del params
  start = jax.tree.map(lambda a, g: a - 0.2 * g, start, gradient)
  return start, start


def make(periods=PERIODS, rule=None, reduce="mean", slower=None):
  rule = rule or optax.sgd(0.1, momentum=0.5)
  names = [f"l{i}" for i in range(len(periods))]
  return [
    levels.Level(
      name, period, rule, reduce,
      slower if i + 1 < len(periods) else None,
    )
    for i, (name, period) in enumerate(zip(names, periods))
  ]  # fmt: skip


def start(count=3, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {f"l{i}": {"w": draw(WIDTH, WIDTH) * 0.5} for i in range(count)}


def units(count, dtype=jnp.float32, seed=1):
  rng = np.random.default_rng(seed)
  return {
    "x": jnp.asarray(rng.normal(size=(count, WIDTH)), dtype),
    "y": jnp.asarray(rng.normal(size=(count, WIDTH)), dtype),
    "weight": jnp.asarray(rng.integers(0, 3, count), dtype),
  }


def loss_fn(params, carry, unit):
  """A chain of levels, with a state that depends on them."""
  h = unit["x"] + carry
  for name in sorted(params):
    h = h + jnp.tanh(h @ params[name]["w"])
  loss = unit["weight"] * jnp.sum((h - unit["y"]) ** 2)
  return loss, (0.5 * carry + 0.1 * h, unit["weight"], h)


def part(tree, index):
  """The same place of every leaf."""
  return jax.tree.map(lambda x: x[index], tree)


def times(tree, factor):
  return jax.tree.map(lambda x: x * factor, tree)


CARRY = jnp.zeros(WIDTH)


_grad = jax.jit(jax.grad(loss_fn, has_aux=True))


def by_hand(made, params, carry, xs, slower=None):
  """An independent loop: Python, no scan, no clocks in arrays."""
  params = dict(params)
  begin, rules = dict(params), {}
  gathered, weight, outputs, last = {}, {}, [], {}
  for level in made:
    rules[level.name] = level.rule.init(params[level.name])
    gathered[level.name] = jax.tree.map(jnp.zeros_like, params[level.name])
    weight[level.name] = 0.0
  for j in range(len(xs["weight"])):
    unit = part(xs, j)
    grads, (carry, w, output) = _grad(params, carry, unit)
    outputs.append(output)
    for level in made:
      gathered[level.name] = jax.tree.map(
        jnp.add, gathered[level.name], grads[level.name]
      )
      weight[level.name] += float(w)
    for i, level in enumerate(made):
      if level.period is None or (j + 1) % level.period:
        continue
      name, total = level.name, weight[level.name]
      if total:
        scale = 1 / total if level.reduce == "mean" else 1.0
        g = times(gathered[name], scale)
        updates, rules[name] = level.rule.update(g, rules[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
        last[name] = g
      else:
        last[name] = jax.tree.map(jnp.zeros_like, gathered[name])
      gathered[name] = jax.tree.map(jnp.zeros_like, gathered[name])
      weight[name] = 0.0
      if slower and i:
        below = made[i - 1].name
        begin[below], params[below] = slower(
          begin[below], params[below], last[below]
        )
        rules[below] = made[i - 1].rule.init(params[below])
  return params, carry, jnp.stack(outputs)


def close(a, b, tol=1e-12):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b
  )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _scan(made, state, carry, xs, fresh):
  return levels.nested_scan(loss_fn, made, state, carry, xs, fresh=fresh)


def scan(made, params, xs, fresh, carry=CARRY):
  state = levels.nested_init(made, params)
  return _scan(tuple(made), state, carry.astype(xs["x"].dtype), xs, fresh)


@pytest.mark.parametrize("slower", [None, reptile, fomaml])
@pytest.mark.parametrize("count,reduce", [
  (1, "mean"), (5, "mean"), (12, "mean"), (31, "mean"), (31, "sum"),
])  # fmt: skip
def test_nested_flat_and_loop_agree(count, slower, reduce):
  with jax.enable_x64(True):
    made = make(reduce=reduce, slower=slower)
    params, xs = start(dtype=jnp.float64), units(count, jnp.float64)
    nested = scan(made, params, xs, True)
    flat = scan(made, params, xs, False)
    close(nested, flat)
    weights, carry, outputs = by_hand(
      made, params, CARRY.astype(jnp.float64), xs, slower
    )
    close({k: at.params for k, at in nested[0].items()}, weights)
    close(nested[1:], (carry, outputs))
    clocks = [int(nested[0][x.name].clock) for x in made]
    assert clocks == [count % p for p in PERIODS]


def maml(names, periods, count, params, carry, xs, slower):
  """Two levels; the start of the fast one moves by the full gradient."""
  (fast, slow), (m, n) = names, periods
  make_two = [
    levels.Level(fast, m, optax.sgd(0.1, momentum=0.5)),
    levels.Level(slow, None, optax.identity()),
  ]
  params, begin, outputs = dict(params), params[fast], []
  for at in range(0, count, n):
    piece = part(xs, slice(at, min(at + n, count)))
    if len(piece["weight"]) < n:
      _, _, out = by_hand(make_two, {**params, fast: begin}, carry, piece)
      return jnp.concatenate([*outputs, out])

    def last(start, carry=carry, piece=piece, rest=params[slow]):
      """Loss of the last period, and the gradient of the slow level's own."""
      before = part(piece, slice(n - m))
      now, c, _ = by_hand(make_two, {fast: start, slow: rest}, carry, before)
      total = 0.0
      for j in range(n - m, n):
        value, (c, _, _) = loss_fn(now, c, part(piece, j))
        total += value
      return total / piece["weight"][n - m :].sum()

    g = jax.grad(last)(begin)
    alone = [make_two[0], levels.Level(slow, n, optax.sgd(0.1))]
    both, after, out = by_hand(alone, {**params, fast: begin}, carry, piece)
    outputs.append(out)
    carry, params = after, both
    begin, _ = slower(begin, None, g)
  return jnp.concatenate(outputs)


def full(*periods):
  """Levels that restart by full gradients; the slowest has no momentum."""
  made = make(periods, slower=fomaml)
  slowest = dataclasses.replace(made[-1], rule=optax.sgd(0.1))
  return [dataclasses.replace(x, full=True) for x in made[:-1]] + [slowest]


@pytest.mark.parametrize("count", [6, 15])
def test_the_full_gradient_of_a_start_is_that_of_the_loop(count):
  with jax.enable_x64(True):
    made = full(2, 6)
    params, xs = start(2, jnp.float64), units(count, jnp.float64)
    xs["weight"] = xs["weight"] + 0.5
    carry = CARRY.astype(jnp.float64)
    state = levels.nested_init(made, params, carry, part(xs, 0))
    expected = maml(("l0", "l1"), (2, 6), count, params, carry, xs, fomaml)
    for fresh in (True, False):
      _, _, outputs = _scan(tuple(made), state, carry, xs, fresh)
      np.testing.assert_allclose(outputs, expected, atol=1e-12)


def test_full_gradients_of_nested_starts_in_any_form():
  with jax.enable_x64(True):
    made = full(1, 2, 4)
    # Third derivatives of all three are slow to compile.
    made[0] = dataclasses.replace(made[0], full=False)
    params, xs = start(dtype=jnp.float64), units(11, jnp.float64)
    carry = CARRY.astype(jnp.float64)
    state = levels.nested_init(made, params, carry, part(xs, 0))
    nested = _scan(tuple(made), state, carry, xs, True)
    flat = _scan(tuple(made), state, carry, xs, False)
    close(nested[1:], flat[1:])
    weights = lambda out: {k: at.params for k, at in out[0].items()}
    close(weights(nested), weights(flat))
    at, c, parts = state, carry, []
    for a, b, fresh in ((0, 7, True), (7, 8, False), (8, 11, False)):
      at, c, out = _scan(tuple(made), at, c, part(xs, slice(a, b)), fresh)
      parts.append(out)
    close(jnp.concatenate(parts), nested[2])
  with pytest.raises(ValueError, match="needs carry and x"):
    levels.nested_init(made, params)


def test_any_split_into_calls_and_steps_is_the_same():
  with jax.enable_x64(True):
    made, params = make(slower=reptile), start(dtype=jnp.float64)
    xs = units(29, jnp.float64)
    whole = scan(made, params, xs, True)
    state, carry = levels.nested_init(made, params), CARRY.astype(jnp.float64)
    parts = []
    for a, b in ((0, 1), (1, 8), (8, 9), (9, 26), (26, 29)):
      piece = part(xs, slice(a, b))
      state, carry, out = _scan(tuple(made), state, carry, piece, False)
      parts.append(out)
    close((state, carry, jnp.concatenate(parts)), whole)
    state, carry = levels.nested_init(made, params), CARRY.astype(jnp.float64)
    step = jax.jit(lambda s, c, x: levels.nested_step(loss_fn, made, s, c, x))
    for j in range(29):
      state, carry, _ = step(state, carry, part(xs, j))
    close((state, carry), whole[:2])


def test_rows_out_of_step_are_as_alone():
  made, params = make(), start()
  xs = units(20)
  cut = (3, 10)
  states, carries = [], []
  for k in cut:
    piece = part(xs, slice(k))
    state, carry, _ = scan(made, params, piece, True)
    states.append(state)
    carries.append(carry)
  stack = lambda *x: jnp.stack(x)
  state = jax.tree.map(stack, *states)
  carry = jnp.stack(carries)
  rest = jax.tree.map(lambda x: jnp.stack([x[k : k + 10] for k in cut]), xs)
  run = lambda s, c, x: levels.nested_scan(loss_fn, made, s, c, x)
  both = jax.jit(jax.vmap(run))(state, carry, rest)
  for i, k in enumerate(cut):
    piece = part(xs, slice(k + 10))
    alone = scan(made, params, piece, True)
    close(part(both[0], i), alone[0], 1e-5)


def outer(made, xs, fresh, params, first_order=False, carry=CARRY):
  state = levels.nested_init(made, params)
  _, _, outputs = levels.nested_scan(
    loss_fn, made, state, carry.astype(xs["x"].dtype), xs, fresh=fresh,
    first_order=first_order,
  )  # fmt: skip
  return jnp.mean((outputs - xs["y"]) ** 2)


RULES = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.1, momentum=0.9),
  "adam_memory": optim.adam_memory(0.05),
  "deep_momentum": optim.deep_momentum(0.05),
  "delta_momentum": optim.delta_momentum(0.05),
  "m3": optim.m3(0.05),
}


@pytest.mark.parametrize("name", list(RULES))
def test_outer_gradient_is_that_of_finite_differences(name):
  with jax.enable_x64(True):
    made = make((2, 4), RULES[name])
    params, xs = start(2, jnp.float64), units(9, jnp.float64)
    loss = jax.jit(lambda p: outer(made, xs, True, p))
    grads = jax.jit(jax.grad(lambda p: outer(made, xs, True, p)))(params)
    rng = np.random.default_rng(2)
    for _ in range(3):
      way = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape)), params
      )
      ahead, back = (
        loss(jax.tree.map(jnp.add, params, times(way, h)))
        for h in (1e-5, -1e-5)
      )
      wanted = float(ahead - back) / 2e-5
      got = sum(map(jnp.vdot, jax.tree.leaves(grads), jax.tree.leaves(way)))
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)
    flat = jax.jit(jax.grad(lambda p: outer(made, xs, False, p)))(params)
    close(flat, grads, 1e-10)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("fresh", [True, False])
def test_outer_gradient_is_finite_without_inner_gradients(name, fresh):
  made, params, xs = make((2, 4), RULES[name]), start(2), units(8)
  masked = xs | {"weight": jnp.zeros(8)}
  silent = xs | {"y": jnp.zeros((8, WIDTH)), "x": jnp.zeros((8, WIDTH)),
                 "weight": jnp.ones(8)}  # fmt: skip
  loss = lambda params, xs: outer(made, xs, fresh, params)
  both = jax.jit(jax.value_and_grad(loss))
  for given in (masked, silent):
    value, grads = both(params, given)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_masked_units_and_periods_change_nothing():
  made, params = make(), start()
  xs = units(24)
  xs["weight"] = xs["weight"].at[2:4].set(0)
  state, _, _ = scan(made, params, part(xs, slice(4)), True)
  before, _, _ = scan(made, params, part(xs, slice(2)), True)
  # Its second period had no weight: parameters and rule stay, bit for bit.
  for a, b in zip(jax.tree.leaves(state["l0"][:4]),
                  jax.tree.leaves(before["l0"][:4])):  # fmt: skip
    np.testing.assert_array_equal(a, b)
  nan = xs | {"x": xs["x"].at[2:4].set(7.0)}
  other, _, _ = scan(made, params, part(nan, slice(4)), True)
  close(other["l2"].gathered, state["l2"].gathered, 0)


def test_first_order_stops_at_the_inner_gradients():
  made, params, xs = make((2, 4)), start(2), units(8)
  second = jax.grad(lambda p: outer(made, xs, True, p))(params)
  first = jax.grad(lambda p: outer(made, xs, True, p, True))(params)
  values = [outer(made, xs, True, params, f) for f in (False, True)]
  assert values[0] == values[1]
  gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first, second)
  assert max(jax.tree.leaves(gap)) > 1e-3


def test_no_period_is_the_plain_chain():
  params, xs = start(), units(10)
  frozen = make((None, None, None))
  rate_0 = make(PERIODS, optax.sgd(0.0))
  carry, expected = CARRY, []
  for j in range(10):
    _, (carry, _, h) = loss_fn(params, carry, part(xs, j))
    expected.append(h)
  for made in (frozen, rate_0, make((64, 128, 256))):
    _, _, outputs = scan(made, params, xs, True)
    close(outputs, jnp.stack(expected), 1e-6)


def test_temporaries_grow_with_the_sum_of_the_scans():
  """Four lengths: sqrt growth of a square of two scans, not linear."""
  sizes = {}
  for n in (4, 8, 16, 32):
    made = make((n,), optax.sgd(0.1))
    xs = units(n * n)
    grad = jax.jit(jax.grad(lambda p, xs=xs, m=made: outer(m, xs, True, p)))
    memory = grad.lower(start(1)).compile().memory_analysis()
    carried = sum(x.nbytes for x in jax.tree.leaves(xs))
    sizes[n] = memory.temp_size_in_bytes - carried
  # Units grow by 64; what is kept beyond inputs and outputs by about 8.
  assert sizes[32] < 24 * sizes[4], sizes


@pytest.mark.parametrize("change,words", [
  (dict(period=0), "period of level 'a' must be None or an integer >= 1"),
  (dict(period=2.0), "period of level 'a'"),
  (dict(reduce="max"), "must be one of mean, sum; got 'max'"),
])  # fmt: skip
def test_bad_levels(change, words):
  values = dict(name="a", period=1, rule=optax.sgd(1.0)) | change
  with pytest.raises(ValueError, match=words):
    levels.Level(**values)


def test_bad_sets_of_levels():
  with pytest.raises(ValueError, match="each a multiple.*\\[2, 3\\]"):
    levels.nested_init(make((2, 3)), start(2))
  with pytest.raises(ValueError, match="the same names"):
    levels.nested_init(make((2, 4)), start(3))
