"""Every walk on the device at hand: kernels against the XLA form.

A layer of each config at its smallest size, packed documents and padding:
outputs, states and all gradients with `model.mixer.walk` as the kernels and as
"xla". Float32 first; where there is a TPU, bfloat16 as well. Parameters are
moved away from their start, whose zeros would hide what a walk computes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import named as named_lib
from nl_jax import build
from nl_jax.kernels import walk
from nl_jax.models import lm

# Of the largest number of an array: (values, gradients).
_BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}
# On a TPU sums go in another order, and are longer.
_LOOSE = 10
_MOVED = 0.1  # Parameters, from their start.
# What a CPU runs once is compiled as quickly as it can be.
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_parallel_codegen_split_count": 1,
}


class Line(NamedTuple):
  """What came out for a config.

  Attributes:
    config, dtype: of the model.
    walks: names of the walks that ran as kernels.
    others: of those that run by XLA all the same.
    refused: why the config has no kernels; "" where it has.
    values, gradients: largest differences, relative to their array's size.
    bounds: of these.
    still: parameters whose gradient is 0, so that nothing was compared.
  """

  config: str
  dtype: str
  walks: tuple[str, ...]
  others: tuple[str, ...]
  refused: str = ""
  values: float = 0.0
  gradients: float = 0.0
  bounds: tuple[float, float] = (0.0, 0.0)
  still: tuple[str, ...] = ()

  @property
  def holds(self) -> bool:
    """Whether its kernels compute the same, or it says that it has none."""
    fits = (
      self.values <= self.bounds[0] and self.gradients <= self.bounds[1]
    )  # Not of NaN.
    return bool(self.refused) or (bool(self.walks) and fits and not self.still)

  def __str__(self) -> str:
    if self.refused:
      return f"XLA   {self.config}: {self.refused}"
    if not self.walks:
      return f"OFF   {self.config}: no walk ran as a kernel"
    if self.still:
      return f"OFF   {self.config}: no gradient of {', '.join(self.still)}"
    word = "equal" if self.holds else "OFF  "
    rest = f"; by XLA: {', '.join(self.others)}" if self.others else ""
    return (
      f"{word} {self.config} {self.dtype}: {', '.join(self.walks)}: values "
      f"{self.values:.1e} (at most {self.bounds[0]:.0e}), gradients "
      f"{self.gradients:.1e} (at most {self.bounds[1]:.0e}){rest}"
    )


def run(configs: Sequence[str]) -> Iterator[Line]:
  """Checks configs one after the other.

  Args:
    configs: names; the test size of each runs.
  """
  on_tpu = jax.default_backend() == "tpu"
  for name in configs:
    for dtype in ("float32", "bfloat16") if on_tpu else ("float32",):
      yield check(name, dtype, "pallas_tpu" if on_tpu else "pallas_interpret")


def check(name: str, dtype: str, implementation: str) -> Line:
  """A config's layer with its kernels and by XLA."""
  config = named_lib.load_config(f"{name.partition(':')[0]}:smoke")
  with config.unlocked():
    config.train.dtype = dtype
  net = build.model(build.resolve(config))
  net = getattr(net, "base", net)
  try:
    kernels = _by(net, implementation)
  except ValueError as error:  # The mixer's own sentence.
    return Line(name, dtype, (), (), str(error))
  params = _parameters(net)
  with walk.recorded() as calls:
    fused = _both_ways(kernels, params)
  ran = {c.name: None for c in calls if c.implementation == implementation}
  other = {c.name: None for c in calls if c.name not in ran}
  plain = _both_ways(_by(net, "xla"), params)
  loose = _LOOSE if implementation == "pallas_tpu" else 1
  return Line(
    name, dtype, tuple(ran), tuple(other), "",
    _difference(fused[0], plain[0]), _difference(fused[1], plain[1]),
    tuple(loose * bound for bound in _BOUNDS[dtype]), _still(plain[1]),
  )  # fmt: skip


def _by(net: lm.LanguageModel, implementation: str) -> lm.LanguageModel:
  memory = dataclasses.replace(net.mixer, walk=implementation)
  return dataclasses.replace(net, mixer=memory)


def _jit(run: Callable[..., Any]) -> Callable[..., Any]:
  quick = _QUICK if jax.default_backend() == "cpu" else None
  return jax.jit(run, compiler_options=quick)


def _parameters(net: lm.LanguageModel) -> Any:
  """Of a layer, at a point where none is 0 or 1 as it may be at the start."""

  def draw() -> Any:
    blocks = net.init(jax.random.key(0))["blocks"]
    blocks = net.laid(blocks)
    # The last: the first layer of RWKV-7 has parameters without use.
    return jax.tree.map(lambda x: x[-1], blocks)

  noise = np.random.default_rng(0)

  def move(x: jax.Array) -> np.ndarray:
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return x + _MOVED * noise.standard_normal(x.shape).astype(x.dtype)

  return jax.tree.map(move, _jit(draw)())


def _both_ways(net: lm.LanguageModel, layer: Any) -> tuple[Any, Any]:
  """((outputs, state), gradients by name) of a layer with its parameters."""
  fixed = {k: v for k, v in layer["mixer"].items() if k == "first"}
  learned = {k: v for k, v in layer["mixer"].items() if k not in fixed}
  ids = _documents(net)
  x = jax.random.normal(jax.random.key(1), (*ids.shape, net.width), net.dtype)

  def loss(learned: Any, x: Any) -> tuple[jax.Array, Any]:
    params = layer | {"mixer": learned | fixed}
    inside = net.enter(x)
    y, state, _ = net.mix(params, inside, None, ids)
    y = net.leave(y)
    # What stands in padding is nobody's.
    outs = (jnp.where(ids[..., None] != 0, y, 0), state)
    return sum(map(_number, jax.tree.leaves(outs))), outs

  grad = _jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, outs), (by_learned, by_x) = grad(learned, x)
  return outs, {"inputs": by_x, "mixer": by_learned}


def _documents(net: lm.LanguageModel) -> jax.Array:
  """int32 [2,T]: a text that ends within a chunk; two, and padding."""
  unit = net.alignment if net.alignment > 1 else net.mixer.chunk
  edge = unit if net.alignment > 1 else unit + 3
  ids = np.ones((2, 2 * unit + unit // 2), np.int32)
  ids[1, edge:] = 2
  ids[1, -(unit // 4) :] = 0
  return jnp.asarray(ids)


def _number(x: jax.Array) -> jax.Array:
  """A number that every value of an array moves."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros(())
  x = x.astype(jnp.float32)
  at = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
  return jnp.sum(jnp.sin(x) * (0.2 + jnp.cos(at)))


def _still(grads: Any) -> tuple[str, ...]:
  """Names of the gradients that are 0 throughout."""
  named = jax.tree_util.tree_leaves_with_path(grads["mixer"])
  return tuple(
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in named if not np.any(x)
  )  # fmt: skip


def _difference(x: Any, y: Any) -> float:
  """The largest difference of two trees, relative to each array's size."""
  most = 0.0
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    size = max(float(np.abs(b).max(initial=0)), 1e-6)
    # Keeps NaN, as Python's max does not.
    most = float(np.maximum(most, np.abs(a - b).max(initial=0) / size))
  return most
