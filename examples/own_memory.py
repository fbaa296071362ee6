"""A memory of your own: a short store and a long one that exchange.

Each head has two matrices, S and L, both [K, V]. At every token:

    S, L <- S + a (L - S),  L + b (S - L)       they exchange what they hold
    e    =  eta (v - k (S + L))                 what the token did not expect
    S    <- S + k^T e                           is written, into S alone
    y    =  q (S + L)

L is never written to: it fills from S, as long-term memory does from short-term
(after the synapses of Benna and Fusi, 2016; here with a delta rule). With
a = (1 - c)(1 - d) and b = c (1 - d), both learned, one pair a head, S - L keeps
d of itself at a token, and a write ends with its share c in each store. c = 1/2
is DeltaNet; c = 0 is the gated delta rule with a constant decay d.

`chunk` is all that has to be written. From it this script trains a small model
that recalls pairs, reads in pieces, runs the TPU kernels interpreted, and
compiles them for a TPU v5e, forward and backward. docs/own_memory.md leads
through it.

    python examples/own_memory.py
"""

import argparse
import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nl_jax import memory
from nl_jax.kernels import walk
from nl_jax.tasks import recall

C = 16  # Tokens of a chunk; the result does not depend on it.
H, K, D, VOCAB = 4, 16, 64, 64  # Heads, their width, a token's width, tokens.
PAIRS, LENGTH = 8, 40  # Of a problem. 40: the second begins inside a chunk.
Arrays = dict[str, jax.Array]
Carry = tuple[jax.Array, memory.MemoryState]


def chunk(
  slow: Arrays, state: walk.State, x: Arrays, at: walk.At
) -> tuple[walk.State, jax.Array, jax.Array]:
  """All tokens of a chunk at once, exactly.

  The exchange keeps c S + (1 - c) L and shrinks S - L. So of a write, n tokens
  later, S holds c + (1 - c) d^n and L c - c d^n; the errors e solve one
  triangular system, as in every delta rule.

  Args:
    slow: "c" and "log_d", [..., 1, 1].
    state: `w`, "short" and "long" [..., K, V].
    x: "q" and "k" [..., C, K], "v" [..., C, V], "eta" [..., C, 1].
    at: where the tokens stand, and the products (`kernels.walk.At`).

  Returns:
    (state, reads [..., C, V], sums of e^2 and of tokens [..., 1, 2]).
  """
  mm, row, c = at.tile.mm, at.tile.row, slow["c"]
  q, k, v, eta = x["q"], at.tile.rounded(x["k"]), x["v"], x["eta"]
  keep = lambda n: jnp.exp(slow["log_d"] * n)  # d^n
  # Pairs (t, u) of tokens, u not after t; real tokens since the chunk began.
  size = q.shape[-2]
  t, u = (
    jax.lax.broadcasted_iota(jnp.int32, (*q.shape[:-1], size), q.ndim - i)
    for i in (2, 1)
  )
  seen = u <= t
  clock = jnp.sum(jnp.where(seen, row(at.real), 0.0), -1, keepdims=True)
  # Whether a token sees the state before the chunk, the state after it a token.
  old = new = jnp.ones_like(clock)
  if at.ids is not None:  # Documents begin inside the chunk.
    document = at.tile.column(at.ids)
    seen &= document == at.ids
    old = jnp.where(document == 0, old, 0.0)
    new = jnp.where(document == document[..., -1:, :], new, 0.0)
  # What both stores hold together of u's write when t reads.
  age = jnp.where(seen, clock - row(clock), 0.0)
  held = jnp.where(seen, 2 * c + (1 - 2 * c) * keep(age), 0.0)
  level = c * state.w["short"] + (1 - c) * state.w["long"]
  gap = state.w["short"] - state.w["long"]

  def before(z: jax.Array, kind: str) -> jax.Array:
    """z (S + L), were nothing written since the chunk began."""
    left = (1 - 2 * c) * keep(clock) * mm(z, gap, "nn", kind)
    return old * (2 * mm(z, level, "nn", kind) + left)

  lower = jnp.where(u < t, eta * held * mm(k, k, "nt", "gram"), 0.0)
  surprise = eta * (v - before(k, "state"))
  (e,) = at.tile.solve([(lower, surprise)], size)
  y = before(q, "read") + mm(held * mm(q, k, "nt"), e)
  # The stores after the chunk.
  end = lambda z: z[..., -1:, :]
  left, kept = keep(end(clock)) * gap, keep(end(clock) - clock)
  write = lambda share: mm(k, new * share * e, "tn", "state")
  w = {
    "short": end(old) * (level + (1 - c) * left) + write(c + (1 - c) * kept),
    "long": end(old) * (level - c * left) + write(c - c * kept),
  }
  sums = [jnp.sum(z, (-2, -1), keepdims=True) for z in (e * e, at.real)]
  return walk.State(w, state.s), y, jnp.concatenate(sums, -1)


def by_token(
  slow: Arrays, x: Arrays, segment_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The definition: reads [B,T,H,V], S and L [B,H,K,V], in float64."""
  c, d = (np.asarray(z, float) for z in (slow["c"], jnp.exp(slow["log_d"])))
  a, b = (1 - c) * (1 - d), c * (1 - d)
  q, k, v, eta = (np.asarray(x[n], float) for n in ("q", "k", "v", "eta"))
  S, L = np.zeros((2, len(q), *k.shape[2:], v.shape[-1]))
  y, document = np.zeros_like(v), np.zeros(len(q), int)
  for i, t in np.ndindex(segment_ids.shape):
    if segment_ids[i, t] == 0:  # Padding.
      continue
    if segment_ids[i, t] != document[i]:
      S[i] = L[i] = 0
    document[i] = segment_ids[i, t]
    S[i], L[i] = S[i] + a * (L[i] - S[i]), L[i] + b * (S[i] - L[i])
    recalled = np.einsum("hk,hkv->hv", k[i, t], S[i] + L[i])
    e = eta[i, t][:, None] * (v[i, t] - recalled)
    S[i] += np.einsum("hk,hv->hkv", k[i, t], e)
    y[i, t] = np.einsum("hk,hkv->hv", q[i, t], S[i] + L[i])
  return y, S, L


def start(batch: int, heads: int = H, width: int = K) -> memory.MemoryState:
  """Stores that have read nothing."""
  empty = jnp.zeros((heads, width, width))
  return memory.chunked.empty({"short": empty, "long": empty}, batch)


def update(
  slow: Arrays,
  state: memory.MemoryState,
  x: Arrays,
  segment_ids: jax.Array | None,
  implementation: str | None = None,
) -> tuple[jax.Array, memory.MemoryState, jax.Array]:
  """Writes T tokens, [B,T,H,d] each, and reads at each: [B,T,H*V]."""
  return memory.chunked.walk(
    chunk, state, slow, x,
    chunk=C, group=4, segment_ids=segment_ids, chunk_free=True,
    run=memory.Run(implementation), name="own_memory",
  )  # fmt: skip


# The model: one layer whose key is the token before, and its training.


def init(key: jax.Array) -> Arrays:
  """Parameters of the model."""
  shapes = {
    "embed": (VOCAB, D), "q": (D, H, K), "k": (D, H, K), "v": (D, H, K),
    "eta": (D, H), "out": (H * K, VOCAB),
  }  # fmt: skip
  keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
  params = {
    n: jax.random.normal(keys[n], shape) * (1 if n == "embed" else D**-0.5)
    for n, shape in shapes.items()
  }
  # d from 1/2 to almost 1, and c = 1/4.
  spread = jnp.linspace(0.0, 4.0, H).reshape(H, 1, 1)
  return params | {"d": spread, "c": jnp.zeros((H, 1, 1))}


def slow_of(params: Arrays) -> Arrays:
  """What the memory reads of them: 0 < c < 1/2 and log d < 0."""
  c, log_d = jax.nn.sigmoid(params["c"]) / 2, jax.nn.log_sigmoid(params["d"])
  return {"c": c, "log_d": log_d}


def unit(x: jax.Array) -> jax.Array:
  """x of norm 1."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def model(
  params: Arrays, carry: Carry, tokens: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, Carry]:
  """Logits [B,T,VOCAB] of tokens [B,T], and the state for the next call."""
  last, state = carry
  shift = lambda first, x: jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
  same = shift(state.segment, segment_ids) == segment_ids
  earlier = jnp.where(same, shift(last, tokens), 0)
  now, past = params["embed"][tokens], params["embed"][earlier]
  project = lambda x, n: jnp.einsum("btd,dhk->bthk", x, params[n])
  x = {
    "q": unit(project(now, "q")),
    "k": unit(project(past, "k")),
    "v": project(now, "v"),
    "eta": jax.nn.sigmoid(now @ params["eta"]),
  }
  y, state, _ = update(slow_of(params), state, x, segment_ids)
  return y @ params["out"], (tokens[:, -1], state)


def begin(batch: int) -> Carry:
  """What the first call takes."""
  return jnp.zeros((batch,), jnp.int32), start(batch)


def problems(rng: np.random.Generator, rows: int) -> Arrays:
  """Rows of two problems each: pairs are shown, then keys are asked for."""
  parts = [recall.mqar(rng, rows, LENGTH, PAIRS, VOCAB) for _ in range(2)]
  parts[1]["segment_ids"] += 1
  return {n: np.concatenate([p[n] for p in parts], 1) for n in parts[0]}


def loss_of(params: Arrays, batch: Arrays) -> tuple[jax.Array, jax.Array]:
  """(cross entropy of the answers, share that is right)."""
  rows = len(batch["inputs"])
  logits, _ = model(params, begin(rows), batch["inputs"], batch["segment_ids"])
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["targets"]
  )
  right = logits.argmax(-1) == batch["targets"]
  mean = lambda z: jnp.sum(z * batch["weights"]) / batch["weights"].sum()
  return mean(losses), mean(right)


def train(steps: int) -> Arrays:
  """The parameters after some steps of Adam, each on rows of its own."""
  rng = np.random.default_rng(0)
  params = init(jax.random.key(0))
  optimizer = optax.adam(3e-3)
  moments = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(
    params: Arrays, moments: optax.OptState, batch: Arrays
  ) -> tuple[Arrays, optax.OptState, tuple[jax.Array, jax.Array]]:
    grad = jax.value_and_grad(loss_of, has_aux=True)
    told, grads = grad(params, batch)
    updates, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, updates), moments, told

  for i in range(steps):
    batch = problems(rng, 32)
    params, moments, (loss, right) = step(params, moments, batch)
    if i in (0, steps - 1):
      print(f"step {i + 1}: loss {loss:.3f}, recalled {right:.0%}", flush=True)
  return params


# The checks.


def agree(what: str, x: object, y: object, tolerance: float) -> None:
  """Prints the largest difference, of the largest value; ends where too large.

  Args:
    what: for the line.
    x, y: trees of arrays.
    tolerance: how large it may be.
  """
  errors = jax.tree.map(
    lambda x, y: np.abs(x - y).max() / max(np.abs(y).max(), 1e-30), x, y
  )
  error = max(jax.tree.leaves(errors))
  print(f"{what}: {error:.1e}", flush=True)
  if not error <= tolerance:
    sys.exit(f"{what} differs by more than {tolerance}")


def draw(heads: int, tokens: int) -> tuple[Arrays, Arrays, np.ndarray]:
  """(slow, x, segment ids) of two rows: a document in a chunk, and padding."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = {n: normal(2, tokens, heads, K) for n in ("q", "k", "v")}
  x |= {"q": unit(x["q"]), "k": unit(x["k"])}
  x["eta"] = jax.nn.sigmoid(normal(2, tokens, heads))
  ids = np.ones((2, tokens), np.int32)
  ids[0, 21:] = 2
  ids[1, -5:] = 0
  return slow_of({n: normal(heads, 1, 1) for n in ("c", "d")}), x, ids


def check_forms() -> None:
  """Token loop, chunk form and interpreted kernels are one function."""
  slow, x, ids = draw(heads := 2, 2 * C + 8)

  @functools.partial(jax.jit, static_argnums=(0,))
  def run(form: str, slow: Arrays, x: Arrays) -> tuple[tuple, tuple]:
    def weighed(slow: Arrays, x: Arrays) -> tuple[jax.Array, tuple]:
      y, state, _ = update(slow, start(2, heads), x, ids, form)
      y = jnp.where(ids[..., None] != 0, y, 0)
      outs = (y, state.w["short"], state.w["long"])
      return sum(jnp.sum(jnp.sin(3 * z)) for z in outs), outs

    grad = jax.value_and_grad(weighed, (0, 1), has_aux=True)
    (_, outs), grads = grad(slow, x)
    return outs, grads

  y, *stores = by_token(slow, x, ids)
  loop = (y.reshape(*ids.shape, -1), *stores)
  outs, grads = run("xla", slow, x)
  agree("chunk form and token loop", outs, loop, 1e-5)
  fused, fused_grads = run("pallas_interpret", slow, x)
  agree("kernels and chunk form, values", fused, outs, 1e-5)
  agree("kernels and chunk form, gradients", fused_grads, grads, 1e-4)


def check_streaming(params: Arrays) -> None:
  """A row in pieces gives what it gives at once."""
  batch = problems(np.random.default_rng(2), 2)
  call = jax.jit(model)
  tokens, ids = batch["inputs"], batch["segment_ids"]
  whole, (_, end) = call(params, begin(2), tokens, ids)
  carry, parts = begin(2), []
  for piece in np.split(np.arange(2 * LENGTH), (26, 27, 28, 54)):
    logits, carry = call(params, carry, tokens[:, piece], ids[:, piece])
    parts.append(logits)
  pieces = (np.concatenate(parts, axis=1), carry[1].w)
  agree("a row in five pieces and at once", pieces, (whole, end.w), 1e-5)


def compile_here() -> None:
  """Compiles the memory and its gradient for one chip of a v5e."""
  slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = jax.sharding.Mesh(np.array(slice_.devices[:1]), ("chip",))

  def struct(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    place = NamedSharding(mesh, P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  heads, width, rows, tokens = 8, 64, 4, 512
  slow = {n: struct("float32", heads, 1, 1) for n in ("c", "log_d")}
  wide = (rows, tokens, heads, width)
  x = {n: struct("bfloat16", *wide) for n in ("q", "k", "v")}
  x["eta"] = struct("float32", *wide[:3])

  def loss(slow: Arrays, x: Arrays, ids: jax.Array) -> jax.Array:
    state = start(rows, heads, width)
    y, state, _ = update(slow, state, x, ids, "pallas_tpu")
    return jnp.sum(y * y) + jnp.sum(state.w["long"])

  with jax.set_mesh(mesh):
    ids = struct("int32", rows, tokens)
    made = jax.jit(jax.grad(loss, (0, 1))).lower(slow, x, ids).compile()
  text = made.as_text()
  kernels = set(re.findall(r"own_memory_(?:fwd|bwd)", text))
  loops = text.count(" while(")
  print(f"compiled for v5e: {', '.join(sorted(kernels))}; loops: {loops}")


def check_compiler() -> None:
  """`compile_here` in a process of its own, where JAX finds no chip."""
  if importlib.util.find_spec("libtpu") is None:
    print("not compiled for a TPU: libtpu, its compiler, is not installed")
    return
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  }
  done = subprocess.run([sys.executable, __file__, "--compile"], env=env)
  if done.returncode:
    sys.exit("the kernels do not compile for v5e")


def main() -> None:
  """Trains the model and makes all checks."""
  flags = argparse.ArgumentParser(description="A memory of your own.")
  flags.add_argument("--steps", type=int, default=200, help="of training")
  flags.add_argument(
    "--compile", action="store_true", help="only compile for a TPU v5e"
  )
  args = flags.parse_args()
  if args.compile:
    compile_here()
    return
  check_forms()
  params = train(args.steps)
  check_streaming(params)
  check_compiler()


if __name__ == "__main__":
  main()
