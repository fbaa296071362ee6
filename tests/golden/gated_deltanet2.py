"""Makes gated_deltanet2.npz: the rule of Gated DeltaNet-2, in float64.

A token loop in numpy, written from the equations of arXiv 2605.22791 apart from
the code here, with decays, erase and write gates from their logits: values, the
last state, and gradients of sum(y * cotangent), by complex steps.

Run: python -m tests.golden.gated_deltanet2
"""

import numpy as np

from tests.golden import _oracle

PACKAGES = ["numpy"]
B, T, H, K, V = 1, 11, 2, 4, 6
WIDTHS = dict(q=K, k=K, v=V, decay=K, erase=K, write=V)
STEP = 1e-30


def loop(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """y [B,T,H,V] and the last state [B,H,K,V], of real or complex inputs."""
  unit = lambda z: z / np.sqrt((z * z).sum(-1, keepdims=True))
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  q, k = unit(x["q"]) * K**-0.5, unit(x["k"])
  alpha = 1 / (1 + np.exp(x["decay"]))  # exp(-softplus).
  b, w = sigmoid(x["erase"]), sigmoid(x["write"])
  y, S = np.zeros_like(x["v"]), np.zeros((B, H, K, V), x["v"].dtype)
  for row, head in np.ndindex(B, H):
    state = S[row, head]
    for t in range(T):
      at = (row, t, head)
      state = np.diag(alpha[at]) @ state
      error = w[at] * x["v"][at] - (b[at] * k[at]) @ state
      state = state + np.outer(k[at], error)
      y[at] = q[at] @ state
    S[row, head] = state
  return y, S


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  rng = np.random.default_rng(0)
  x = {n: rng.standard_normal((B, T, H, d)) for n, d in WIDTHS.items()}
  y, state = loop(x)
  out = dict(x, y=y, state=state, cotangent=rng.standard_normal(y.shape))
  for name in WIDTHS:
    gradient = np.zeros_like(x[name])
    for place in np.ndindex(gradient.shape):
      moved = {n: z.astype(complex) for n, z in x.items()}
      moved[name][place] += STEP * 1j
      loss = (loop(moved)[0] * out["cotangent"]).sum()
      gradient[place] = loss.imag / STEP
    out[f"grad/{name}"] = gradient
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
