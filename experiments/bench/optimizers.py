"""Time and state of one optimizer update, as ratios (docs/optimizers.md).

A tree of 10.5M parameters: four layers, D 512, F 1024, as a transformer has
them. Compared updates run in turns and their least times are divided.
"""

import time
from collections.abc import Mapping
from typing import Any

_ROUNDS = 5
_LAYERS, _D, _F = 4, 512, 1024


def _params(stacked: bool) -> dict:
  import jax

  shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (_D, _D))
  shapes |= {"w_gate": (_D, _F), "w_up": (_D, _F), "w_down": (_F, _D)}
  key = jax.random.key(0)
  draw = lambda *s: jax.random.normal(key, s)
  if stacked:
    return {k: draw(_LAYERS, *s) for k, s in shapes.items()}
  return {
    f"layer_{i}": {k: draw(*s) for k, s in shapes.items()}
    for i in range(_LAYERS)
  }


class _Update:
  """One compiled update that feeds its own state back, without a copy."""

  def __init__(self, tx: Any, params: dict):
    import jax

    self.params = params
    self.state = jax.jit(tx.init)(params)
    self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
    self.run = jax.jit(tx.update, donate_argnums=1)
    self.updates: Any = None

  def __call__(self) -> None:
    import jax

    self.updates, self.state = self.run(self.params, self.state, self.params)
    jax.block_until_ready((self.updates, self.state))


def _least(updates: Mapping[str, _Update]) -> dict[str, float]:
  for update in updates.values():
    update()
    update()
  least = dict.fromkeys(updates, float("inf"))
  for _ in range(_ROUNDS):
    for name, update in updates.items():
      begin = time.perf_counter()
      update()
      least[name] = min(least[name], time.perf_counter() - begin)
  return least


def _optimizers(dims: Any) -> dict:
  import optax

  from nl_jax import optim

  every = lambda tree: _map(lambda _: dims, tree)
  muon = dict(alpha=None, second_moment=None)
  return {
    "adam": optax.adam(1e-3),
    "optax muon": optax.contrib.muon(
      1e-3, nesterov=False, eps=1e-12, weight_decay=0.0, consistent_rms=0.2,
      muon_weight_dimension_numbers=every,
    ),
    "muon": optim.m3(1e-3, **muon),
    "m3": optim.m3(1e-3, slow_every=100),
    "delta element": optim.delta_momentum(1e-3, granularity="element"),
    "delta tensor": optim.delta_momentum(1e-3, granularity="tensor"),
    "delta matrix": optim.delta_momentum(1e-3),
    "deep": optim.deep_momentum(1e-3),
  }  # fmt: skip


def _map(function: Any, tree: Any) -> Any:
  """`jax.tree.map`, imported late: commands start without JAX."""
  import jax

  return jax.tree.map(function, tree)


_RATIOS = (
  ("m3 / our Muon", "m3", "muon", 1.3),
  ("delta momentum, element / Adam", "delta element", "adam", 2.0),
  ("delta momentum, tensor / Adam", "delta tensor", "adam", 2.0),
  ("delta momentum, matrix / our Muon", "delta matrix", "muon", 0.3),
  ("deep momentum / our Muon", "deep", "muon", 0.5),
)
# Copies of the parameters held as state. Deep momentum: the EMA of the
# gradients, and 2 M / r for each matrix (c, r) with M = c / 4.
_DEEP = sum(c * c / 2 for c in (_D,) * 6 + (_F,)) / (4 * _D * _D + 3 * _D * _F)
_COPIES = {
  "adam": 2.0,
  "muon": 1.0,
  "m3": 5.0,
  "delta matrix": 1.0,
  "deep": 1.0 + _DEEP,
}


def _against_optax(stacked: bool) -> list[dict]:
  """Our Muon and optax's on the same leaves: equal numbers, less time."""
  import jax
  import optax

  params = _params(stacked)
  dims = optax.contrib.MuonDimensionNumbers(-2, -1)
  both = _optimizers(dims)
  both = {k: _Update(both[k], params) for k in ("muon", "optax muon")}
  least = _least(both)
  pairs = zip(*(jax.tree.leaves(u.updates) for u in both.values()))
  gap = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
  # Stacked, both are bound by the same matrix products.
  kind = "4 stacked layers" if stacked else "28 separate leaves"
  target = "<= 1" if stacked else "<= 0.6"
  return [
    dict(what=f"our Muon / optax.contrib.muon, {kind}",
         ratio=least["muon"] / least["optax muon"], target=target),
    dict(what=f"  the same: largest relative difference, {kind}",
         ratio=gap, target="<= 1e-4"),
  ]  # fmt: skip


def run() -> list[dict]:
  """Rows {"what", "ratio", "target"}; a ratio is of times or of bytes."""
  import jax
  import optax

  rows = [*_against_optax(stacked=True), *_against_optax(stacked=False)]
  params = _params(stacked=True)
  dims = optax.contrib.MuonDimensionNumbers(-2, -1)
  optimizers = _optimizers(dims)
  del optimizers["optax muon"]
  updates = {k: _Update(tx, params) for k, tx in optimizers.items()}
  least = _least(updates)
  for what, mine, theirs, target in _RATIOS:
    ratio = least[mine] / least[theirs]
    rows.append(dict(what=what, ratio=ratio, target=f"<= {target:g}"))
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  for name, copies in _COPIES.items():
    ratio = updates[name].bytes / size
    rows.append(dict(what=f"{name}: copies of the parameters held as state",
                     ratio=ratio, target=f"~ {copies:.2f}"))  # fmt: skip
  return rows
