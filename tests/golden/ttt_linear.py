"""Makes ttt_linear.npz: flash-linear-attention's TTT-Linear, in float32.

Its reference adds the layer norm to the read, ours to the query, so the fast
weights after the last mini-batch are what is comparable: values, and gradients
of sum(weight * cotangent). Its step sizes belong to the rows, not the sources.

Run: python -m tests.golden.ttt_linear
"""

import numpy as np
import torch

from tests.golden import _oracle

PACKAGES = ["torch", "fla-core"]
B, T, H, K, CHUNK = 2, 12, 2, 4, 4


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  naive = _oracle.module_at("fla", "ops/ttt/naive.py")
  rng = np.random.default_rng(0)

  def leaf(*shape: int) -> torch.Tensor:
    x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
    return x.requires_grad_()

  leaves = {
    "k": leaf(B, T, H, K),
    "v": leaf(B, T, H, K),
    "scale": leaf(H, K),
    "shift": leaf(H, K),
    "row": leaf(CHUNK),
    "w": leaf(H, K, K),
    "b": leaf(H, K),
  }
  rows = torch.sigmoid(leaves["row"]).repeat(T // CHUNK)
  copies = lambda x: x[None].expand(B, *x.shape)
  _, w, b = naive.chunk_ttt_linear_ref(
    leaves["k"].detach().clone(),
    leaves["k"],
    leaves["v"],
    leaves["scale"],
    leaves["shift"],
    rows[None, :, None, None].expand(B, T, H, 1),
    mini_batch_size=CHUNK,
    initial_state=copies(leaves["w"]),
    initial_state_bias=copies(leaves["b"])[:, :, None],
    output_final_state=True,
  )
  last = torch.cat([w, b], dim=2)
  cotangent = torch.tensor(rng.standard_normal(last.shape), dtype=last.dtype)
  grads = torch.autograd.grad((last * cotangent).sum(), list(leaves.values()))
  out = {"last": last.detach().numpy(), "cotangent": cotangent.numpy()}
  for (name, x), g in zip(leaves.items(), grads):
    out[f"in/{name}"], out[f"grad/{name}"] = x.detach().numpy(), g.numpy()
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
