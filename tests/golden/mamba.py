"""Makes mamba.npz: a Mamba layer of transformers, in float64.

Its layer without kernels of its own; weights under our names and in our
layout, moved from their start, values and gradients of sum(y * cotangent) for
input and parameters. Its step sizes and decays are float32 whatever its
weights are.

Run: python -m tests.golden.mamba
"""

import numpy as np
import torch
from transformers.models.mamba import configuration_mamba, modeling_mamba

from tests.golden import _oracle

PACKAGES = ["torch", "transformers"]
B, T, WIDTH, STATE = 2, 19, 8, 4
NAMES = {
  "conv1d.bias": "b_x",
  "x_proj.weight": "w_dbc",
  "dt_proj.weight": "w_dt",
  "dt_proj.bias": "b_dt",
  "A_log": "A_log",
  "D": "D_skip",
  "out_proj.weight": "w_o",
}


def _ours(p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Its kernels (d_out, d_in) as our parameters."""
  w_x, w_z = np.split(p["in_proj.weight"].T, 2, axis=1)
  made = {"w_x": w_x, "w_z": w_z, "conv_x": p["conv1d.weight"][:, 0].T}
  for name, ours in NAMES.items():
    made[ours] = p[name].T if "weight" in name else p[name]
  return made


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  config = configuration_mamba.MambaConfig(
    hidden_size=WIDTH,
    state_size=STATE,
    num_hidden_layers=1,
    time_step_rank=3,
    vocab_size=16,
  )
  torch.manual_seed(0)
  net = modeling_mamba.MambaMixer(config, 0).double()
  rng = np.random.default_rng(0)
  draw = lambda shape: torch.tensor(rng.standard_normal(shape))
  with torch.no_grad():
    for p in net.parameters():
      p.add_(0.3 * draw(p.shape))
  x = draw((B, T, WIDTH)).requires_grad_()
  y = net(x)
  cotangent = draw(y.shape)
  named = dict(net.named_parameters())
  grads = torch.autograd.grad((y * cotangent).sum(), [x, *named.values()])
  out = {"x": x.detach().numpy(), "grad/x": grads[0].numpy()}
  out |= {"y": y.detach().numpy(), "cotangent": cotangent.numpy()}
  values = {n: p.detach().numpy() for n, p in named.items()}
  slopes = {n: g.numpy() for n, g in zip(named, grads[1:])}
  for prefix, tree in (("", values), ("grad/", slopes)):
    out |= {prefix + name: array for name, array in _ours(tree).items()}
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
