"""Makes comba.npz: flash-linear-attention's Comba rule, in float32.

Its token loop, fed with unit queries and keys, erase keys p = sigmoid(d) k and
corrected queries q - D p: values, last state, and gradients of
sum(y * cotangent).

Run: python -m tests.golden.comba
"""

import numpy as np
import torch

from tests.golden import _oracle

PACKAGES = ["torch", "fla-core"]
B, T, H, K, V = 2, 13, 2, 4, 6


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  naive = _oracle.module_at("fla", "ops/comba/naive.py")
  rng = np.random.default_rng(0)
  draw = lambda *shape: torch.tensor(
    rng.standard_normal(shape), dtype=torch.float32
  )
  shapes = dict(q=(K,), k=(K,), v=(V,), beta=(), g=())
  leaves = {n: draw(B, T, H, *s) for n, s in shapes.items()}
  leaves |= {"erase": draw(H), "correction": draw(H)}
  for x in leaves.values():
    x.requires_grad_()
  unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
  q, k = unit(leaves["q"]), unit(leaves["k"])
  p = torch.sigmoid(leaves["erase"])[:, None] * k
  y, state = naive.naive_recurrent_comba(
    q - leaves["correction"][:, None] * p,
    k,
    leaves["v"],
    p,
    torch.sigmoid(leaves["beta"]),
    torch.nn.functional.logsigmoid(leaves["g"]),
    output_final_state=True,
  )
  cotangent = draw(*y.shape)
  grads = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
  out = {"y": y.detach().numpy(), "state": state.detach().numpy()}
  out["cotangent"] = cotangent.numpy()
  for (name, x), g in zip(leaves.items(), grads):
    out[name], out[f"grad/{name}"] = x.detach().numpy(), g.numpy()
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
