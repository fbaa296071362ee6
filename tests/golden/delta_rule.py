"""Makes delta_rule.npz: delta rules of two other code bases, in float32.

flash-linear-attention's token loops, delta rule and gated delta rule, and the
Gated DeltaNet layer of Qwen3-Next in transformers: values, and the gradients
of sum(output * cotangent) with respect to every input and parameter.

Run: python -m tests.golden.delta_rule
"""

import numpy as np
import torch

from tests.golden import _oracle

PACKAGES = ["torch", "transformers", "fla-core"]
B, T, H, K, V = 2, 13, 2, 4, 6
WIDTH, LENGTH = 12, 70  # The layer; longer than one of its chunks of 64.


def _leaf(rng: np.random.Generator, *shape: int) -> torch.Tensor:
  x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
  return x.requires_grad_()


def _record(out: dict, prefix: str, y, leaves: dict, rng) -> None:
  """Adds inputs, output, cotangent and gradients under a prefix."""
  cotangent = torch.tensor(rng.standard_normal(y.shape), dtype=y.dtype)
  grads = torch.autograd.grad(
    (y * cotangent).sum(), list(leaves.values()), retain_graph=True
  )
  out[f"{prefix}/y"] = y.detach().numpy()
  out[f"{prefix}/cotangent"] = cotangent.numpy()
  for (name, x), g in zip(leaves.items(), grads):
    out[f"{prefix}/{name}"] = x.detach().numpy()
    out[f"{prefix}/grad/{name}"] = g.numpy()


def rules(out: dict) -> None:
  """The two token loops; tokens before heads, keys and queries unit."""
  delta = _oracle.module_at("fla", "ops/delta_rule/naive.py")
  gated = _oracle.module_at("fla", "ops/gated_delta_rule/naive.py")
  rng = np.random.default_rng(0)
  shapes = dict(q=(K,), k=(K,), v=(V,), beta=(), g=())
  leaves = {n: _leaf(rng, B, T, H, *s) for n, s in shapes.items()}
  unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
  q, k, v = unit(leaves["q"]), unit(leaves["k"]), leaves["v"]
  beta = torch.sigmoid(leaves["beta"])
  g = torch.nn.functional.logsigmoid(leaves["g"])
  y, state = gated.naive_recurrent_gated_delta_rule(
    q, k, v, beta, g, output_final_state=True
  )
  out["gated_rule/state"] = state.detach().numpy()
  _record(out, "gated_rule", y, leaves, rng)
  leaves.pop("g")
  first = [x.transpose(1, 2) for x in (q, k, v, beta)]
  y, state = delta.delta_rule_recurrence(*first)
  out["delta_rule/state"] = state.detach().numpy()
  _record(out, "delta_rule", y.transpose(1, 2), leaves, rng)


def layer(out: dict) -> None:
  """A whole layer, its weights under our names and in our layout."""
  from transformers.models.qwen3_next import modeling_qwen3_next as qwen
  from transformers.models.qwen3_next.configuration_qwen3_next import (
    Qwen3NextConfig,
  )

  config = Qwen3NextConfig(
    hidden_size=WIDTH,
    linear_num_value_heads=H,
    linear_num_key_heads=H,
    linear_key_head_dim=K,
    linear_value_head_dim=V,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
  )
  torch.manual_seed(0)
  net = qwen.Qwen3NextGatedDeltaNet(config, 0)
  rng = np.random.default_rng(1)
  with torch.no_grad():
    for p in net.parameters():
      p.add_(0.3 * torch.tensor(rng.standard_normal(p.shape)))
  x = _leaf(rng, B, LENGTH, WIDTH)
  y = net(x)
  cotangent = torch.tensor(rng.standard_normal(y.shape), dtype=y.dtype)
  named = dict(net.named_parameters())
  grads = torch.autograd.grad((y * cotangent).sum(), [x, *named.values()])
  out["layer/x"], out["layer/grad/x"] = x.detach().numpy(), grads[0].numpy()
  out["layer/y"] = y.detach().numpy()
  out["layer/cotangent"] = cotangent.numpy()
  values = {n: p.detach().numpy() for n, p in named.items()}
  slopes = {n: g.numpy() for n, g in zip(named, grads[1:])}
  for prefix, tree in (("layer/", values), ("layer/grad/", slopes)):
    for name, array in _ours(tree).items():
      out[prefix + name] = array


def _ours(p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Its fused kernels (d_out, d_in), head by head, as our parameters."""
  fused = p["in_proj_qkvz.weight"].reshape(H, 2 * K + 2 * V, WIDTH)
  parts = np.split(fused, np.cumsum([K, K, V]), axis=1)
  made = {
    f"w_{name}": part.reshape(-1, WIDTH).T for name, part in zip("qkvg", parts)
  }
  gates = p["in_proj_ba.weight"].reshape(H, 2, WIDTH)
  made |= {"w_beta": gates[:, 0].T, "w_a": gates[:, 1].T}
  taps = p["conv1d.weight"][:, 0].T
  for name, part in zip("qkv", np.split(taps, [H * K, 2 * H * K], axis=1)):
    made[f"conv_{name}"] = part
  made |= {"A_log": p["A_log"], "dt_bias": p["dt_bias"]}
  return made | {"norm/scale": p["norm.weight"], "w_o": p["out_proj.weight"].T}


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  out = {}
  rules(out)
  layer(out)
  return out


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
