"""A small model and a small data set with the contracts of the real ones."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.models import leaves as leaf
from nl_jax.train import loop, optimizer
from nl_jax.train import options as options_lib
from nl_jax.train import origin as origin_lib

VOCAB, WIDTH, BATCH, LENGTH = 16, 8, 8, 4
TOKENS = BATCH * LENGTH


class Sums(NamedTuple):
  """As `nl_jax.memory.rule.Metrics`, [L,B,H]."""

  inner_loss: jax.Array
  update_norm: jax.Array
  memory_norm: jax.Array
  eta: jax.Array
  alpha: jax.Array
  beta: jax.Array
  count: jax.Array


class Model:
  """Embedding, CMS levels, tied logits; counts how often it is traced."""

  def __init__(
    self,
    periods: tuple[int, ...] = (0,),
    variant: str = "sequential",
  ):
    names = ("ffn",) if len(periods) == 1 else ("high", "mid", "low")
    self.cms = types.SimpleNamespace(
      levels=names[: len(periods)], periods=periods, variant=variant
    )
    self.traces = 0

  def init(self, key: jax.Array) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 1 + 3 * len(self.cms.levels)))
    draw = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    blocks = {
      level: {
        "w_gate": draw(1, WIDTH, WIDTH),
        "w_up": draw(1, WIDTH, WIDTH),
        "w_down": draw(1, WIDTH, WIDTH),
      }
      for level in self.cms.levels
    }
    return {
      "embed": draw(VOCAB, WIDTH),
      "blocks": {"cms": blocks},
      "final_norm": {"scale": jnp.ones((WIDTH,))},
    }

  def leaves(self) -> leaf.Leaves:
    """As the table of a `LanguageModel`, but for the starts."""
    zeros = jax.nn.initializers.zeros
    kernel = lambda shape, axes: leaf.Leaf(shape, axes, zeros, True, True)
    made = {
      "embed": leaf.Leaf((VOCAB, WIDTH), ("vocab", "embed"), zeros, True),
      "final_norm/scale": leaf.scale(WIDTH, "act_embed"),
    }
    for level in self.cms.levels:
      for name in ("w_gate", "w_up", "w_down"):
        axes = ("mlp", "embed") if name == "w_down" else ("embed", "mlp")
        shape = (1, WIDTH, WIDTH)
        made[f"blocks/cms/{level}/{name}"] = kernel(shape, ("layer", *axes))
    return made

  def axes(self) -> dict[str, tuple[str, ...]]:
    return leaf.axes(self.leaves())

  def apply(
    self,
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    state: Any = None,
    *,
    segment_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, Any, dict[str, Sums]]:
    del state
    self.traces += 1
    x = params["embed"][tokens_BxT]
    for level in self.cms.levels:
      w = params["blocks"]["cms"][level]
      gate = jax.nn.silu(x @ w["w_gate"][0])
      x = x + (gate * (x @ w["w_up"][0])) @ w["w_down"][0]
    # A token of segment 7 is not finite.
    x = x * jnp.where(segment_ids == 7, jnp.inf, 1.0)[..., None]
    logits = (x * params["final_norm"]["scale"][None, None]) @ params["embed"].T
    real = (segment_ids > 0).astype(jnp.float32)
    ones = jnp.sum(real, 1)[None, :, None]
    sums = Sums(*([ones * v for v in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]), ones)
    return logits, None, {"memory": sums}

  def levels(self) -> tuple[list, Any]:
    def labels(params: dict[str, Any]) -> dict[str, Any]:
      def one(path: tuple, _: jax.Array) -> str:
        names = [entry.key for entry in path]
        if "cms" not in names or len(self.cms.levels) == 1:
          return "slow"
        return f"cms/{names[2]}"

      return jax.tree_util.tree_map_with_path(one, params)

    return [], labels


class Data:
  """Batch k is a function of k; a token predicts twice itself."""

  def __init__(self, spikes: tuple[int, ...] = (), hook: Any = None):
    self.index = 0
    self.spikes = spikes
    self.hook = hook

  def __iter__(self) -> "Data":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(self.index)
    inputs = rng.integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    segments = np.ones_like(inputs)
    segments[0, -1] = 0
    if self.index in self.spikes:
      segments[2, 1] = 7
    if self.hook:
      self.hook(self.index)
    self.index += 1
    return {
      "inputs": inputs,
      "targets": (2 * inputs % VOCAB).astype(np.int32),
      "weights": (segments > 0).astype(np.float32),
      "segment_ids": segments,
    }

  def get_state(self) -> dict[str, int]:
    return {"next_row": self.index * BATCH}

  def set_state(self, state: dict[str, int]) -> None:
    self.index = state["next_row"] // BATCH


def batch(index: int = 0) -> dict[str, np.ndarray]:
  """One batch."""
  data = Data()
  data.index = index
  return next(data)


def run(
  workdir: Any,
  *,
  model: Model | None = None,
  data: Data | None = None,
  mesh: Any = None,
  config: Any = None,
  evaluate: Any = None,
  fingerprint: str = "f",
  optim: dict | None = None,
  origin: Any = "",
  kept: str = "",
  allow_config_change: bool = False,
  batch_size: int = BATCH,
  flops_per_token: float = 0.0,
  **options: Any,
) -> loop.Result:
  """Trains the stub; 10 steps, a line every other step."""
  model = Model() if model is None else model
  options = {"steps": 10, "log_every": 2, "checkpoint_every": 4} | options
  options = options_lib.Options(**options)
  made = optimizer.make(
    model,
    steps=options.steps,
    tokens_per_step=batch_size * LENGTH,
    learning_rate=1e-2,
    warmup_steps=2,
    **(optim or {}),
  )
  return loop.train(
    model=model,
    optimizer=made,
    data=Data() if data is None else data,
    batch_size=batch_size,
    sequence_length=LENGTH,
    workdir=str(workdir),
    config={"model": {"width": WIDTH}} if config is None else config,
    options=options,
    fingerprint=fingerprint,
    mesh=mesh,
    evaluate=evaluate,
    allow_config_change=allow_config_change,
    origin=origin_lib.parse(str(origin), kept),
    flops_per_token=flops_per_token,
  )


def evaluate(params: Any, step: int) -> dict[str, float]:
  """A number that hangs on the parameters."""
  return {"eval/norm": float(jnp.sum(params["embed"]) + step)}
