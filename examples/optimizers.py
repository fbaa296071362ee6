"""All optimizers on scikit-learn's digits: a table and a picture, in a minute.

    pip install scikit-learn matplotlib
    python examples/optimizers.py [--steps=300] [--picture=optimizers.png]

A network of three layers learns 1,347 images of 8 x 8 pixels; the other 450
are validation. Every optimizer has three seeds at each of three rates: that of
the column "start here" of docs/optimizers.md, a third and three times of it.
Nothing is tuned for this problem but that one rate, and small images say
little of large models: the table shows which rates hold, not which optimizer
is best.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from nl_jax import optim

SEEDS = 3
FACTORS = (1 / 3, 1.0, 3.0)
BATCH = 128
TRAIN = 1347
WIDTH = 64


class Arm(NamedTuple):
  """An optimizer and the learning rate to start with."""

  make: Callable[[Any], optax.GradientTransformation]
  rate: float


ARMS = {
  "adam (optax)": Arm(optax.adam, 3e-3),
  "momentum (optax)": Arm(lambda rate: optax.sgd(rate, 0.9), 0.1),
  "muon (optax)": Arm(optax.contrib.muon, 1e-2),
  "m3": Arm(optim.m3, 1e-2),
  "muon": Arm(optim.muon, 1e-2),
  "m3_paper": Arm(optim.m3_paper, 1e-4),
  "delta_momentum": Arm(optim.delta_momentum, 0.1),
  "deep_momentum": Arm(optim.deep_momentum, 0.3),
  "adam_memory": Arm(optim.adam_memory, 3e-3),
  "adagrad_memory": Arm(optim.adagrad_memory, 0.1),
}


class Data(NamedTuple):
  """Images [n, 64] in [0, 1] and their digits [n]."""

  images: jax.Array
  digits: jax.Array


def load() -> tuple[Data, Data]:
  """Training and validation."""
  images, digits = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(images))
  images = jnp.asarray(images[order] / 16, jnp.float32)
  digits = jnp.asarray(digits[order])
  return (
    Data(images[:TRAIN], digits[:TRAIN]),
    Data(images[TRAIN:], digits[TRAIN:]),
  )


def init(key: jax.Array) -> dict:
  """Two hidden layers and a head."""
  keys = jax.random.split(key, 3)
  layer = lambda key, c, r, scale: {
    "kernel": jax.random.normal(key, (c, r)) * scale * c**-0.5,
    "bias": jnp.zeros(r),
  }
  return {
    "layers": [
      layer(keys[0], 64, WIDTH, 1.5),
      layer(keys[1], WIDTH, WIDTH, 1.5),
    ],
    "head": layer(keys[2], WIDTH, 10, 0.5),
  }


def logits(params: dict, images: jax.Array) -> jax.Array:
  """[n, 10]."""
  apply = lambda layer, x: x @ layer["kernel"] + layer["bias"][None]
  x = images
  for layer in params["layers"]:
    x = jax.nn.silu(apply(layer, x))
  return apply(params["head"], x)


def loss_of(params: dict, data: Data) -> jax.Array:
  """Mean cross-entropy in nat."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, data.images), data.digits
  ).mean()


def train(
  make: Callable[[Any], optax.GradientTransformation],
  steps: int,
  data: tuple[Data, Data],
  rate: jax.Array,
  seed: jax.Array,
) -> dict[str, jax.Array]:
  """One run at a constant rate: losses, and what validation says."""
  learned, held_out = data
  tx = make(rate)
  params = init(jax.random.key(seed))

  def step(carry, key):
    params, state = carry
    rows = jax.random.randint(key, (BATCH,), 0, TRAIN)
    batch = Data(learned.images[rows], learned.digits[rows])
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  keys = jax.random.split(jax.random.key(seed + 1000), steps)
  (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
  hit = logits(params, held_out.images).argmax(-1) == held_out.digits
  return {
    "losses": losses,
    "validation": loss_of(params, held_out),
    "accuracy": hit.mean(),
  }


def compare(steps: int) -> dict[str, dict[str, np.ndarray]]:
  """By optimizer: results [rate, seed, ...]; prints a line for each."""
  data = load()
  print("validation loss in nat: mean over seeds at rate / 3, rate, rate x 3")
  found = {}
  for name, arm in ARMS.items():
    begin = time.perf_counter()
    run = functools.partial(train, arm.make, steps, data)
    by_seed = jax.vmap(run, in_axes=(None, 0))
    by_rate = jax.jit(jax.vmap(by_seed, in_axes=(0, None)))
    rates = arm.rate * jnp.asarray(FACTORS)
    got = jax.tree.map(np.asarray, by_rate(rates, jnp.arange(SEEDS)))
    found[name] = got
    means = ", ".join(f"{x:.4f}" for x in got["validation"].mean(1))
    print(
      f"{name}: {means} (rate {arm.rate:g}, spread over seeds "
      f"{got['validation'][1].std():.4f}, accuracy "
      f"{got['accuracy'][1].mean():.1%}, {time.perf_counter() - begin:.0f} s)",
      flush=True,
    )
  return found


def draw(found: dict[str, dict[str, np.ndarray]], path: str) -> None:
  """Training losses at the rates to start with, and validation at all."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(11, 4.5), constrained_layout=True
  )
  window = max(next(iter(found.values()))["losses"].shape[-1] // 20, 1)
  for i, (name, got) in enumerate(found.items()):
    style = dict(color=f"C{i % 10}", label=name)
    curve = got["losses"][1].mean(0)
    smooth = np.convolve(curve, np.ones(window) / window, "valid")
    steps = np.arange(len(smooth)) + window
    left.plot(steps, smooth, linestyle="--" if "optax" in name else "-",
              **style)  # fmt: skip
    # Rates side by side, a third on the left; a dot is a seed.
    for j, values in enumerate(got["validation"]):
      at = np.full(len(values), i + 0.25 * (j - 1))
      right.plot(at, values, "o" if j == 1 else ".", color=style["color"])
  left.set(
    title="Training at the rate to start with, mean of 3 seeds", xlabel="step",
    ylabel="loss in nat", yscale="log",
  )  # fmt: skip
  left.legend(fontsize=7)
  right.set(
    title="Validation at a third, one and three times the rate",
    ylabel="loss in nat", yscale="log", xticks=range(len(found)),
  )  # fmt: skip
  right.set_xticklabels(found, rotation=40, ha="right", fontsize=8)
  right.grid(axis="y", alpha=0.3)
  figure.savefig(path, dpi=120)
  print(f"wrote {path}")


def main() -> None:
  """Runs the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--picture", default="optimizers.png")
  flags = parser.parse_args()
  draw(compare(flags.steps), flags.picture)


if __name__ == "__main__":
  main()
