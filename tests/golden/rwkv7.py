"""Makes rwkv7.npz: flash-linear-attention's rule of RWKV-7, in float32.

Its token loop of the generalised delta rule (`dplr`), fed as its layer feeds
it: alpha = -kappa, beta = kappa a, log decays -e^{-1/2} sigmoid(.), scale 1.
Values, last state, and gradients of sum(y * cotangent).

Run: python -m tests.golden.rwkv7
"""

import numpy as np
import torch

from tests.golden import _oracle

PACKAGES = ["torch", "fla-core"]
B, T, H, K, V = 2, 13, 2, 4, 6


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  naive = _oracle.module_at("fla", "ops/generalized_delta_rule/dplr/naive.py")
  rng = np.random.default_rng(0)
  draw = lambda *shape: torch.tensor(
    rng.standard_normal(shape), dtype=torch.float32
  )
  leaves = {n: draw(B, T, H, K) for n in ("r", "k", "w", "kappa", "a")}
  leaves["v"] = draw(B, T, H, V)
  for x in leaves.values():
    x.requires_grad_()
  head = lambda x: x.transpose(1, 2)
  kappa = torch.nn.functional.normalize(leaves["kappa"], dim=-1)
  y, state = naive.dplr_recurrence(
    head(leaves["r"]) * K**0.5,  # It divides by this.
    head(leaves["k"]),
    head(leaves["v"]),
    head(-kappa),
    head(kappa * torch.sigmoid(leaves["a"])),
    head(-0.6065306597126334 * torch.sigmoid(leaves["w"])),
  )
  y, cotangent = head(y), draw(B, T, H, V)
  grads = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
  out = {"y": y.detach().numpy(), "state": state.detach().numpy()}
  out["cotangent"] = cotangent.numpy()
  for (name, x), g in zip(leaves.items(), grads):
    out[name], out[f"grad/{name}"] = x.detach().numpy(), g.numpy()
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
