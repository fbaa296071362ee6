"""Other libraries beside ours, where they are installed, on equal arrays.

    flash-linear-attention  the gated delta rule, on a CUDA device
    jax-linear-attention    the same, by the kernel that it chooses
    titans-pytorch          its memory layer, beside the mixer `titans_lmm`

All forward and backward. A library that is not installed gives no row. The
ratio of a row is our time over that of the library: below 1 ours is faster.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

_SHAPE = (4, 4096, 16, 128)  # B, T, H and K of the rule.
_LAYER = (1, 4096)  # B and T of a layer of memory.
_QUICK = (1, 64, 2, 16)
_CHUNK = 64


def run(
  least_seconds: Callable, mixer: Callable[[int, int], Any], quick: bool
) -> list[dict]:
  """A row for each library that is installed.

  Args:
    least_seconds: of `bench`.
    mixer: (rows, tokens) to a call of the gradient of `titans_lmm`.
    quick: small arrays.
  """
  rows = []
  shape = _QUICK if quick else _SHAPE
  arrays = _arrays(shape)
  for name, module, make in (
    ("flash-linear-attention", "fla", _fla),
    ("jax-linear-attention", "jla", _jla),
  ):
    if importlib.util.find_spec(module) is not None:
      calls = {"nl_jax": _delta_rule(arrays), name: make(arrays)}
      rows.append(_row("the gated delta rule", shape[:2], name, calls,
                       least_seconds))  # fmt: skip
  if importlib.util.find_spec("titans_pytorch") is not None:
    batch, tokens = _QUICK[:2] if quick else _LAYER
    ours = mixer(batch, tokens)
    calls = {"nl_jax": ours, "titans-pytorch": _titans(ours.args[-1])}
    rows.append(_row("a layer of memory", (batch, tokens), "titans-pytorch",
                     calls, least_seconds))  # fmt: skip
  return rows


def _row(
  what: str, shape: tuple, name: str, calls: dict, least_seconds: Callable
) -> dict:
  times = least_seconds(calls)
  ratio = times["nl_jax"] / times[name]
  ms = {
    library: f"{1e3 * seconds:.2f} ms" for library, seconds in times.items()
  }
  return dict(
    kind="ours beside", name=f"{name}, {what}", rows=shape[0], tokens=shape[1],
    seconds=times["nl_jax"], ratio=ratio, target="reported",
    tokens_per_s=shape[0] * shape[1] / times["nl_jax"],
    what=f"{what}, {shape[0]} x {shape[1]:,}: nl_jax {ms['nl_jax']} / {name} "
    f"{ms[name]}",
  )  # fmt: skip


def _arrays(shape: tuple[int, int, int, int]) -> dict[str, Any]:
  """q, k, v [B,T,H,K], k of unit length, and log decay g and rate beta."""
  import numpy as np

  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  g = -0.1 * rng.random(shape[:3]).astype(np.float32)
  return dict(q=q, k=k, v=v, g=g, beta=rng.random(shape[:3], np.float32))


def _squares(y: Any) -> Any:
  return (y.astype("float32") ** 2).sum()


def _delta_rule(arrays: dict[str, Any]) -> Callable[[], Any]:
  """Our gated delta rule."""
  import jax.numpy as jnp

  from nl_jax import memory
  from nl_jax.memory import linear
  from nl_jax.models import layers
  from nl_jax.models.mixers import deltanet

  batch, _, heads, width = arrays["q"].shape
  rule = deltanet.Options(chunk=_CHUNK).rule

  def loss(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    start = {"w": jnp.zeros((heads, width, width))}
    y, _, _ = linear.update(
      None, linear.start(start, batch, rule=rule), q * width**-0.5, k, v,
      memory.Gates(eta=beta, log_alpha=g), rule=rule, at_edge=True,
      chunk_free=True, run=layers.run("auto", rate=1.0, dtype=q.dtype),
    )  # fmt: skip
    return _squares(y)

  return _gradient(loss, arrays)


def _jla(arrays: dict[str, Any]) -> Callable[[], Any]:
  import jla.ops

  def loss(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    y, _ = jla.ops.linear_attention("gated_deltanet", q, k, v, g=g, beta=beta)
    return _squares(y)

  return _gradient(loss, arrays)


def _gradient(loss: Callable, arrays: dict[str, Any]) -> Callable[[], Any]:
  """A compiled gradient of all five arrays; bfloat16 but for the gates."""
  import jax
  import jax.numpy as jnp

  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  args = [
    jnp.asarray(x, dtype if name in "qkv" else jnp.float32)
    for name, x in arrays.items()
  ]
  return functools.partial(jax.jit(jax.grad(loss, range(5))), *args)


def _fla(arrays: dict[str, Any]) -> Callable[[], Any]:
  import torch
  from fla.ops.gated_delta_rule import chunk_gated_delta_rule

  given = {
    name: torch.tensor(
      x, device="cuda",
      dtype=torch.bfloat16 if name in "qkv" else torch.float32,
    ).requires_grad_()
    for name, x in arrays.items()
  }  # fmt: skip

  def call() -> None:
    y, _ = chunk_gated_delta_rule(**given)
    torch.autograd.grad(y.float().square().sum(), list(given.values()))
    torch.cuda.synchronize()

  return call


def _titans(x_BxTxD: Any) -> Callable[[], Any]:
  """The layer of titans-pytorch on the input of ours."""
  import numpy as np
  import titans_pytorch
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  x = torch.tensor(np.asarray(x_BxTxD, np.float32), device=device)
  width = x.shape[-1]
  heads = max(width // 64, 1)
  layer = titans_pytorch.NeuralMemory(
    dim=width, dim_head=width // heads, heads=heads, chunk_size=_CHUNK
  ).to(device)
  learned = [p for p in layer.parameters() if p.requires_grad]

  def call() -> None:
    y, _ = layer(x)
    torch.autograd.grad(y.square().sum(), learned, allow_unused=True)
    if device == "cuda":
      torch.cuda.synchronize()

  return call
