"""Builders of the Titans configs (arXiv 2501.00663).

Deep memories that learn by momentum; shapes, chunks and gates' starts are
ours, unstated there (model.md sections 6, 7.2 and 9).
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def lmm(size: str, arg: str) -> ConfigDict:
  """Titans (LMM) at a scale; preset B's rate, as HOPE."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["titans_lmm"][size]
  memory = _memory(shape)
  return _common.baseline("titans_lmm", size, shape, memory, learning_rate=None)


def dla(size: str, arg: str) -> ConfigDict:
  """Deep linear attention at a scale, Titans without error and momentum."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["dla"][size]
  memory = _memory(shape)
  memory.objective = "dot"  # What makes it DLA.
  memory.momentum = "off"  # So does this.
  del memory.beta_bias, memory.inner_muon
  memory.retention_target = "init"  # At 0 two layers have no gradient; ours.
  memory.eta_max = 0.02  # Above it products of layers grow; ours.
  return _common.baseline("dla", size, shape, memory, learning_rate=None)


def memora(size: str, arg: str) -> ConfigDict:
  """Memora (Miras) at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["memora"][size]
  memory = _memory(shape)
  memory.memory = "mlp_ln"  # What Miras has.
  memory.momentum = "off"  # Memora has none.
  memory.eta_max = 0.01  # At 0.1 gradients reach 1e4 at 256 tokens; ours.
  del memory.beta_bias, memory.omega, memory.inner_muon
  # Rank of the gates' projections (Miras: 32 to 64).
  memory.rank = 32 if size in ("smoke", "tiny") else 64
  memory.lag = False  # Sums to one at chunk starts alone: a chunk at once.
  return _common.baseline("memora", size, shape, memory, learning_rate=None)


def mag(size: str, arg: str) -> ConfigDict:
  """Titans, memory as gate, at a scale."""
  return _hybrid("titans_mag", size, arg)


def mal(size: str, arg: str) -> ConfigDict:
  """Titans, memory as layer, at a scale."""
  return _hybrid("titans_mal", size, arg)


def mac(size: str, arg: str) -> ConfigDict:
  """Titans, memory as context, at a scale."""
  return _hybrid("titans_mac", size, arg)


def _hybrid(arch: str, size: str, arg: str) -> ConfigDict:
  """A memory with attention beside it; preset B's rate, as HOPE."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES[arch][size]
  memory = _memory(shape)
  memory.persistent = 4  # Learned tokens that all attend to; ours, unstated.
  if arch == "titans_mac":
    memory.segment = shape.window  # Tokens that attend to each other; ours.
  else:
    memory.window = shape.window  # Tokens that each attends to; ours.
  if arch != "titans_mal":
    memory.mag_gate = "sigmoid"  # Of the memory's output; or silu, linear.
  return _common.baseline(arch, size, shape, memory, learning_rate=None)


def _memory(shape: presets.Shape) -> ConfigDict:
  """The group `model.mixer`: `models.titans.Options`."""
  return ConfigDict(
    dict(
      memory="mlp",  # Or linear, mlp_ln, glu.
      hidden=shape.hidden,  # M, hidden units of an MLP memory; 0: head_dim.
      residual=True,  # The memory adds its input.
      objective="l2",  # Inner loss; or dot, huber, huber_norm, lp.
      dgd_scope="none",  # Plain gradient descent; or per_layer, input_layer.
      dgd_coef="prox",  # Of the erase, where there is one; or raw, decayed.
      momentum="ema",  # Or sum (as printed, diverges on repeats), off.
      retention_target="zero",  # Decay to zero, or to the learned start.
      erase_of="whole",  # Of an erase: the memory, or its deviation.
      read="after",  # Own write seen; or before, chunk_start.
      residual_clip=1.0,  # Largest norm of an inner error; 0: off.
      inner_mean=False,  # Inner loss divided by the value width.
      remat_group=4,  # Chunks between states kept for the backward pass.
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
      stop_grad_writes=False,  # Outer gradient stops at inner writes.
      chunk=shape.chunk,  # Tokens that share one gradient point.
      omega=1,  # Tokens whose gradients each token writes (Atlas).
      inner_muon="off",  # Momentum made orthogonal: chunk, token (Atlas).
      value_norm="none",  # Of values; or l2.
      eta_max=0.1,  # Largest inner learning rate per token.
      eta_bias=0.0,  # eta = eta_max sigmoid(. + eta_bias).
      alpha_bias=4.0,  # Retention alpha = sigmoid(. + alpha_bias).
      beta_bias=2.2,  # Momentum beta = sigmoid(. + beta_bias): 0.9.
    )
  )
