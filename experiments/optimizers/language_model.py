"""A byte language model on the embedded corpus (spec 6.2, 6.3).

Decoder: D 128, L 2, H 4, T 128, B 16, bytes, pre-RMSNorm, RoPE, GELU of 4 D, no
biases, untied head: 459,392 parameters. It is written here, in few lines and in
JAX alone, so that figures of optimizers do not move with our models.
"""

import ast
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers import arms
from nl_jax.data import sources

D, LAYERS, HEADS, T, B, VOCAB = 128, 2, 4, 128, 16, 256
TOPIC_BYTES = 600_000


def init(key: jax.Array) -> dict:
  """Parameters; kernels N(0, 1/c), outputs of residual branches halved."""
  keys = iter(jax.random.split(key, 8))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  kernel = lambda c, r: draw(LAYERS, c, r) * c**-0.5
  ones = lambda *shape: jnp.ones((*shape, D))
  return {
    "embed": draw(VOCAB, D) * 0.1,
    "blocks": {
      "norm_1": ones(LAYERS),
      "norm_2": ones(LAYERS),
      **{name: kernel(D, D) for name in ("wq", "wk", "wv")},
      "wo": kernel(D, D) * 0.5,
      "up": kernel(D, 4 * D),
      "down": kernel(4 * D, D) * 0.5,
    },
    "norm": ones(),
    "head": draw(D, VOCAB) * 0.5 * D**-0.5,
  }


def _norm(x, scale):
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _rope(x_BxTxHxK):
  half = x_BxTxHxK.shape[-1] // 2
  rate = 10_000.0 ** (-np.arange(half) / half)
  angle = np.arange(x_BxTxHxK.shape[1])[:, None] * rate[None]
  cos, sin = (jnp.asarray(f(angle))[None, :, None] for f in (np.cos, np.sin))
  a, b = jnp.split(x_BxTxHxK, 2, -1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def loss_fn(params: dict, tokens: jax.Array) -> jax.Array:
  """Mean cross-entropy in nat a byte of int32 [B, T + 1] windows."""
  x = params["embed"][tokens[:, :-1]]

  def block(x, p):
    h = _norm(x, p["norm_1"])
    split = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    q, k, v = (split(h @ p[name]) for name in ("wq", "wk", "wv"))
    y = jax.nn.dot_product_attention(_rope(q), _rope(k), v, is_causal=True)
    x = x + y.reshape(x.shape) @ p["wo"]
    return x + jax.nn.gelu(_norm(x, p["norm_2"]) @ p["up"]) @ p["down"], None

  x, _ = jax.lax.scan(block, x, params["blocks"])
  logits = _norm(x, params["norm"]) @ params["head"]
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  ).mean()


@functools.cache
def _documents() -> tuple[str, ...]:
  """The files of the corpus that travels with nl_jax, in its order."""
  source = sources.embedded()
  return (*source.train, *source.validation)


def corpus() -> tuple[np.ndarray, str]:
  """(its bytes, what they are)."""
  data = "".join(_documents()).encode()
  return np.frombuffer(data, np.uint8), f"embedded corpus, {_about(data)}"


def _about(data: bytes) -> str:
  digest = hashlib.sha256(data).hexdigest()
  return f"{len(data):,} bytes, SHA-256 {digest[:16]}"


def _docstrings() -> str:
  """The prose in the corpus."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  found = (
    ast.get_docstring(node)
    for text in _documents()
    for node in ast.walk(ast.parse(text))
    if isinstance(node, kinds)
  )
  return "\n\n".join(text for text in found if text)


def topics() -> tuple[dict[str, np.ndarray], str]:
  """({name: bytes}, what they are): the four topics of the stream.

  Code and prose are of the embedded corpus, tables and sums are drawn.
  """
  rng = np.random.default_rng(7)
  pairs = rng.integers(0, 1000, (60_000, 2))
  codes = rng.integers(0, 2**16, 40_000)
  found = {
    "code": "".join(_documents()),
    "tables": "".join(f"{i:>5} 0x{i:04x} 0b{i:016b}\n" for i in codes),
    "prose": _docstrings(),
    "sums": "".join(f"{a}+{b}={a + b}\n" for a, b in pairs),
  }
  cut = {k: v.encode()[:TOPIC_BYTES] for k, v in found.items()}
  sizes = ", ".join(f"{k} {len(v):,}" for k, v in cut.items())
  about = _about(b"".join(cut.values()))
  return (
    {k: np.frombuffer(v, np.uint8) for k, v in cut.items()},
    f"topics in bytes: {sizes}; {about}",
  )


def split(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """First 90 % and last 10 %."""
  at = len(data) * 9 // 10
  return data[:at], data[at:]


def windows(
  data: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  """uint8 [count, T + 1], at random places."""
  starts = rng.integers(0, len(data) - T - 1, count)
  return np.stack([data[s : s + T + 1] for s in starts])


@functools.cache
def runner(name: str, warmup: int, decays: bool, horizon: int):
  """Compiled (start, continue, evaluate) of one arm; rates are arguments."""

  def shape(t):
    up = jnp.minimum((t + 1) / warmup, 1.0)
    if not decays:
      return up
    done = jnp.clip((t - warmup) / max(horizon - warmup, 1), 0, 1)
    return up * (0.55 + 0.45 * jnp.cos(jnp.pi * done))

  @jax.jit
  def start(seed, rate, b1):
    params = init(jax.random.key(seed))
    return params, arms.make(name, rate, b1, shape).init(params)

  @jax.jit
  def go_on(carry, batches, rate, b1):
    tx = arms.make(name, rate, b1, shape)

    def step(carry, batch):
      params, state = carry
      value, grads = jax.value_and_grad(loss_fn)(
        params, batch.astype(jnp.int32)
      )
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, carry, batches)

  @jax.jit
  def evaluate(params, batches):
    each = jax.lax.map(lambda x: loss_fn(params, x.astype(jnp.int32)), batches)
    return each.mean()

  return start, go_on, evaluate


def run_lm(
  name: str, rate: float, b1: float, seed: int, steps: int, evals: int
) -> dict:
  """One training run: 10 % warm-up, cosine to 10 %; validation at the end."""
  train, held_out = split(corpus()[0])
  start, go_on, evaluate = runner(name, max(steps // 10, 1), True, steps)
  rng = np.random.default_rng(seed)
  batches = windows(train, steps * B, rng).reshape(steps, B, T + 1)
  carry = start(seed, rate, b1)
  (params, state), losses = go_on(carry, batches, rate, b1)
  fixed = windows(held_out, evals, np.random.default_rng(1))
  value = evaluate(params, fixed.reshape(-1, B, T + 1))
  every = max(steps // 60, 1)
  return {
    "validation": float(value),
    "curve": [float(x) for x in np.asarray(losses)[::every]],
    "every": every,
    "state_mib": sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20,
  }


def run_topics(
  name: str, rate: float, b1: float, seed: int, visit: int, evals: int
) -> dict:
  """Four topics, visited twice at a constant rate: online loss, retention."""
  data = {k: split(v) for k, v in topics()[0].items()}
  start, go_on, evaluate = runner(name, max(visit // 2, 1), False, 8 * visit)
  rng = np.random.default_rng(seed)
  held_out = {
    k: windows(v[1], evals, np.random.default_rng(1)).reshape(-1, B, T + 1)
    for k, v in data.items()
  }
  validate = lambda k, carry: float(evaluate(carry[0], held_out[k]))
  carry = start(seed, rate, b1)
  online, first, forgotten, recovery = [], {}, [], []
  for lap in range(2):
    for k, (train, _) in data.items():
      if lap:
        forgotten.append(validate(k, carry) - first[k][0])
      batches = windows(train, visit * B, rng).reshape(visit, B, T + 1)
      carry, losses = go_on(carry, batches, rate, b1)
      losses = np.asarray(losses)
      online += losses.tolist()
      if not lap:
        # The last steps' mean: one batch alone is noisy.
        first[k] = (validate(k, carry), losses[-max(visit // 6, 1) :].mean())
        continue
      there = np.nonzero(losses < first[k][1] + 0.05)[0]
      recovery.append(int(there[0]) if len(there) else visit)
  return {
    "online": float(np.mean(online)),
    "retention": float(np.mean([validate(k, carry) for k in data])),
    "forgetting": float(np.mean(forgotten)),
    "recovery": float(np.mean(recovery)),
  }
