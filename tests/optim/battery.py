"""The optimizers that every shared test runs on: one row each."""

import jax
import jax.numpy as jnp
import optax

from nl_jax import optim

LR = 1e-2


def _all_labels(params):
  return jax.tree.map(lambda _: "all", params)


def bound_multi_frequency(
  learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
  """multi_frequency with its labels bound, as optax's suites need it."""
  return optim.multi_frequency(
    optim.adam_memory(learning_rate), {"all": 4}, _all_labels, reduce="mean"
  )


ALL = {
  "m3": optim.m3(LR, slow_every=3),
  "m3_grad": optim.m3(LR, second_moment="grad", slow_every=3, nesterov=True),
  "m3_stagger": optim.m3(LR, slow_every=4, stagger=True, cache_slow=False),
  "muon": optim.m3(LR, alpha=None, second_moment=None),
  "m3_paper": optim.m3_paper(LR, slow_every=2),
  "delta_matrix": optim.delta_momentum(LR),
  "delta_output": optim.delta_momentum(LR, side="output", key="raw"),
  "delta_implicit": optim.delta_momentum(LR, decay="implicit"),
  "delta_prox": optim.delta_momentum(LR, decay="prox", side="output"),
  "delta_tensor": optim.delta_momentum(LR, decay="clip", granularity="tensor"),
  "delta_element": optim.delta_momentum(LR, granularity="element"),
  "delta_precond": optim.delta_momentum(
    LR, preconditioner=optim.diag_preconditioner()
  ),
  "delta_paper": optim.delta_momentum_paper(LR),
  "diag": optim.scale_by_preconditioned_momentum(optim.diag_preconditioner()),
  "left_gram": optim.scale_by_preconditioned_momentum(
    optim.left_gram_preconditioner(), nesterov=True
  ),
  "orthogonal": optim.scale_by_preconditioned_momentum(
    optim.orthogonal_preconditioner()
  ),
  "tanh": optim.scale_by_feature_momentum(),
  "signed_sqrt": optim.scale_by_feature_momentum("signed_sqrt"),
  "feature_ns": optim.scale_by_feature_momentum("orthogonalize"),
  "deep": optim.deep_momentum(LR),
  "deep_mlp": optim.deep_momentum(
    LR, vector_rule="mlp", output="orthogonalize", decay_layers="all"
  ),
  "deep_trace": optim.deep_momentum(
    LR, vector_rule="trace", inner_step="gd", loss="dot", target="ones"
  ),
  "deep_linear": optim.deep_momentum(LR, memory=optim.LinearMemory()),
  "deep_apply": optim.deep_momentum(
    LR,
    memory=optim.LinearMemory(),
    readout="apply",
    read="pre",
    vector_rule="trace",
  ),
  "deep_fallback": optim.deep_momentum(
    LR, fallback=optim.adam_memory(LR, b2=0.95)
  ),
  "adam_memory": optim.adam_memory(LR),
  "adam_ridge": optim.adam_memory(LR, ridge=1e-3, target="square"),
  "adagrad_memory": optim.adagrad_memory(LR, momentum=True),
  "adagrad_matrix": optim.adagrad_memory(LR, granularity="matrix"),
  "multi_frequency": bound_multi_frequency(LR),
}
COMPLEX = (
  "m3", "m3_grad", "muon", "delta_matrix", "delta_element", "delta_tensor",
  "diag", "tanh", "adam_memory", "adagrad_memory",
)  # fmt: skip


def params(dtype=jnp.float32, seed=0):
  """A stack, two matrices of one shape turned, a vector and a scalar."""
  shapes = {
    "stack": (2, 4, 6),
    "wide": (4, 6),
    "tall": (6, 4),
    "bias": (6,),
    "gain": (),
  }
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  real = {
    k: jax.random.normal(key, shape, jnp.float32)
    for key, (k, shape) in zip(keys, shapes.items())
  }
  if jnp.issubdtype(dtype, jnp.complexfloating):
    real = {k: x * jnp.exp(1j * x) for k, x in real.items()}
  return {k: x.astype(dtype) for k, x in real.items()}
