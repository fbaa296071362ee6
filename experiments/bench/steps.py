"""A train step that can be called again and again, for timing."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.cli import named
from nl_jax import build
from nl_jax.train import state as state_lib
from nl_jax.train import step as step_lib


def tiny(name: str, change: Callable[[Any], None] | None = None) -> Any:
  """The resolved config of a name, changed."""
  config = named.load_config(name)
  if change is not None:
    with config.unlocked():
      change(config)
  return build.resolve(config)


class Stepper:
  """Calls a donating step again and again, on the same random batch.

  Attributes:
    step: the compiled step.
    compile_seconds: CPU seconds of tracing and compiling it.
  """

  def __init__(self, config: Any):
    """Compiles the step of a resolved config and makes its first state."""
    net = build.model(config)
    optimizer = build.make_optimizer(config, net)
    mesh = build.mesh(config)
    B, T = config.data.batch_size, config.data.sequence_length
    with jax.set_mesh(mesh):
      like = state_lib.abstract(net, optimizer.tx, mesh)
      step = step_lib.make(net, optimizer.tx, optimizer.schedule,
                           optimizer.labels)  # fmt: skip
      begin = time.process_time()
      self.step = step_lib.compiled(step, like, mesh, B, T)
      self.compile_seconds = time.process_time() - begin
      self.state = state_lib.create(net, optimizer.tx, like, seed=0)
    rng = np.random.default_rng(0)
    batch = dict(
      inputs=rng.integers(3, 259, (B, T)),
      targets=rng.integers(3, 259, (B, T)),
      weights=np.ones((B, T)),
      segment_ids=np.ones((B, T), int),
    )
    self.batch = {
      k: jax.device_put(v.astype(step_lib.BATCH_DTYPES[k]))
      for k, v in batch.items()
    }

  def __call__(self) -> Any:
    """One step; its metrics."""
    self.state, metrics = self.step(self.state, self.batch)
    return metrics
