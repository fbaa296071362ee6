"""Makes titans_memory.npz: titans-pytorch's NeuralMemory, in float64.

With `batch_size=chunk_size`, so that gradients are taken at the start of each
chunk. Its gates are shared by the tokens of a chunk, ours are not, so two cases
are comparable: "token", chunks of one with momentum and decay, and "chunk",
chunks of four without. The memory is a residual two-layer MLP with the tanh
form of GELU, the loss the mean square.

Run: python -m tests.golden.titans_memory
"""

import numpy as np
import torch
from titans_pytorch import neural_memory

from tests.golden import _oracle

PACKAGES = ["torch", "titans-pytorch"]
B, T, K, M, CHUNK = 2, 11, 4, 6, 4


class Memory(torch.nn.Module):
  """z + gelu(z w_in) w_out."""

  def __init__(self, rng: np.random.Generator):
    super().__init__()
    draw = lambda *shape: torch.nn.Parameter(
      torch.tensor(0.4 * rng.standard_normal(shape))
    )
    self.w_in, self.w_out = draw(K, M), draw(M, K)

  def forward(self, z: torch.Tensor) -> torch.Tensor:
    hidden = torch.nn.functional.gelu(z @ self.w_in, approximate="tanh")
    return z + hidden @ self.w_out


def case(name: str, chunk: int, momentum: bool, out: dict) -> None:
  """One call over T tokens; reads, last weights and all gradients."""
  rng = np.random.default_rng(len(name))
  net = neural_memory.NeuralMemory(
    dim=K,
    chunk_size=chunk,
    batch_size=chunk,
    model=Memory(rng),
    momentum=momentum,
    pre_rmsnorm=False,
    mem_model_norm_add_residual=False,
    init_decay_bias=None if momentum else -1e9,
    default_step_transform_max_lr=2.0,
  )
  if momentum:  # Decay of about 0.1 a token, or nothing would be left.
    torch.nn.init.constant_(net.to_decay_factor[0].bias, -2.0)
  x = torch.tensor(rng.standard_normal((B, T, K)), requires_grad=True)
  y, state = net(x)
  last = {n: w[:, -1] for n, w in state.updates.items()}
  weight = {"y": y, **last}
  cotangents = {
    n: torch.tensor(rng.standard_normal(w.shape)) for n, w in weight.items()
  }
  # Only where both read the same weights: ours at the chunk's start.
  if chunk > 1:
    cotangents["y"][:, chunk - 1 :: chunk] = 0.0
  total = sum((weight[n] * c).sum() for n, c in cotangents.items())
  named = {n: p for n, p in net.named_parameters() if p.requires_grad}
  leaves = {"x": x, **named}
  grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
  for n, w in weight.items():
    out[f"{name}/out/{n}"] = w.detach().numpy()
    out[f"{name}/cotangent/{n}"] = cotangents[n].numpy()
  for (n, leaf), g in zip(leaves.items(), grads):
    if g is not None:
      out[f"{name}/in/{n}"] = leaf.detach().numpy()
      out[f"{name}/grad/{n}"] = g.numpy()


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  out = {}
  torch.manual_seed(0)
  torch.set_default_dtype(torch.float64)
  case("token", 1, True, out)
  case("chunk", CHUNK, False, out)
  torch.set_default_dtype(torch.float32)
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
