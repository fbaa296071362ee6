"""Makes retnet.npz: flash-linear-attention's retention, in float32.

Its reference with tokens after heads (each product of a query and a key under
the decay between them): values and gradients of sum(y * cotangent).

Run: python -m tests.golden.retnet
"""

import numpy as np
import torch

from tests.golden import _oracle

PACKAGES = ["torch", "fla-core"]
B, T, H, K, V = 2, 13, 3, 4, 8


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  naive = _oracle.module_at("fla", "ops/retention/naive.py")
  rng = np.random.default_rng(0)
  draw = lambda width: torch.tensor(
    rng.standard_normal((B, T, H, width)), dtype=torch.float32
  )
  leaves = {"q": draw(K), "k": draw(K), "v": draw(V)}
  for x in leaves.values():
    x.requires_grad_()
  heads_first = [x.transpose(1, 2) for x in leaves.values()]
  y = naive.naive_retention(*heads_first).transpose(1, 2)
  cotangent = draw(V)
  grads = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
  out = {"y": y.detach().numpy(), "cotangent": cotangent.numpy()}
  for (name, x), g in zip(leaves.items(), grads):
    out[name], out[f"grad/{name}"] = x.detach().numpy(), g.numpy()
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
