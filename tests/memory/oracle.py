"""Memories written again, one row and one token at a time, by autodiff.

Straight from docs/mathematics.md 2.3, 2.4, 2.7 and 3.1, sharing no code with
the library but the gates' squashing: inner gradients by `jax.grad` of the
written-out loss, weights formed at every token. For tests only.
"""

import jax
import jax.numpy as jnp
import numpy as np

INPUT = ("w", "w_in", "w_gate")


def forward(arch, residual, W, z):
  if arch == "linear":
    y = z @ W["w"]
  elif arch == "glu":
    y = (jax.nn.gelu(z @ W["w_in"]) * (z @ W["w_gate"])) @ W["w_out"]
  else:
    y = jax.nn.gelu(z @ W["w_in"]) @ W["w_out"]
    if arch == "mlp_ln":
      y = (y - y.mean()) / jnp.sqrt(y.var() + 1e-6)
  return z + y if residual else y


def loss(objective, prediction, target):
  r = prediction - target
  if objective == "dot":
    return -prediction @ target
  if objective == "l2":
    return 0.5 * r @ r
  if objective == "huber":
    a = jnp.abs(r)
    return jnp.where(a <= 1, 0.5 * r * r, a - 0.5).sum()
  size = jnp.sqrt(r @ r + 1e-12)
  return jnp.where(size <= 1, 0.5 * size**2, size - 0.5)


def layer_inputs(arch, W, k):
  if arch == "linear":
    return {"w": k}
  h = jax.nn.gelu(k @ W["w_in"])
  if arch == "glu":
    return {"w_in": k, "w_gate": k, "w_out": h * (k @ W["w_gate"])}
  return {"w_in": k, "w_out": h}


def write(
  arch, residual, rule, anchor, W, S, R, k, target, eta, alpha, beta,
  window=None,
):  # fmt: skip
  """One token into one memory: the new (W, S).

  window: (gamma, k, target) of each token whose gradient it writes.
  """
  of = lambda V, k, target: loss(
    rule.objective, forward(arch, residual, V, k), target
  )
  objective = lambda V: sum(
    gamma * of(V, *pair) for gamma, *pair in window or [(1.0, k, target)]
  )
  grads, inputs = jax.grad(objective)(anchor), layer_inputs(arch, anchor, k)
  if rule.inner_mean:
    grads = jax.tree.map(lambda g: g / target.size, grads)
  new_W, new_S = {}, {}
  for name in W:
    u = inputs[name]
    erases = rule.dgd_scope == "per_layer" or (
      rule.dgd_scope == "input_layer" and name in INPUT
    )
    c = eta
    if erases and rule.dgd_coef == "prox":
      c = eta / (1 + eta * u @ u)
    rate = c * (1 - beta) if rule.momentum == "ema" else c
    step = -rate * grads[name]
    if rule.momentum != "off":
      step = new_S[name] = beta * S[name] + step
    keep = R[name] if rule.retention_target == "init" else 0.0 * R[name]
    erased = W[name] - (keep if rule.erase_of == "deviation" else 0.0)
    new_W[name] = alpha * W[name] + (1 - alpha) * keep + step
    if erases:
      new_W[name] -= c * jnp.outer(u, u @ erased)
  return new_W, new_S


class Clock:
  """The chunk grid of one memory: weights, anchor, place in the chunk."""

  def __init__(self, start, chunk):
    self.start, self.chunk = start, chunk
    self.place = 0
    self.restart()

  def restart(self):
    self.W = self.anchor = dict(self.start)
    self.S = jax.tree.map(jnp.zeros_like, self.W)
    self.seen = []

  def tick(self):
    self.place += 1
    if self.place % self.chunk == 0:
      self.anchor = self.W


def memory(
  arch, residual, rule, params, q, k, v, eta, alpha, beta, ids=None, gamma=None
):  # fmt: skip
  """One head of one row: reads [T, V]; ids: documents, 0 is padding."""
  clock = Clock(params, rule.chunk)
  ids = np.ones(len(q), int) if ids is None else np.asarray(ids)
  document, reads = ids[ids != 0][0], []
  for t in range(len(q)):
    if ids[t] not in (0, document):
      document = ids[t]
      clock.restart()
    before = clock.W
    if ids[t]:
      if gamma is not None:
        clock.seen = [*clock.seen, (gamma[t], k[t], v[t])][-rule.omega :]
      clock.W, clock.S = write(
        arch, residual, rule, clock.anchor, clock.W, clock.S, params,
        k[t], v[t], eta[t], alpha[t], None if beta is None else beta[t],
        clock.seen,
      )  # fmt: skip
    seen = {"after": clock.W, "before": before, "chunk_start": clock.anchor}
    reads.append(forward(arch, residual, seen[rule.read], q[t]))
    clock.tick()
  return jnp.stack(reads), clock


def l2(x):
  return x / jnp.sqrt(x @ x + 1e-6)


def target(config, part, W, v):
  v = l2(v) if part.value_norm == "l2" else v
  if part.value_source == "self":
    v = forward(config.memory, part.residual, W, v)
  return l2(v) if part.value_norm == "target" else v


def self_modifying(config, params, zq, zk, zv):
  """All memories of a head in one loop (docs/mathematics.md 3.1): y [T, K].

  `params` are those of one head: role -> weights, gate -> vectors.
  """
  gen = config.generators
  roles = config.generator_roles
  clocks = {r: Clock(params[r], config.chunk_gen) for r in roles}
  main = Clock(params["memory"], config.chunk_memory)
  gate, reads = params["gate"], []
  for t in range(len(zq)):
    z = {"q": zq[t], "k": zk[t], "v": zv[t]}

    def made(role, z=z):
      z = z[role] if role in ("q", "v") else z["k"]
      if role not in roles:
        return z
      return forward(config.memory, gen.residual, clocks[role].anchor, z)

    k, v, q = l2(made("k")), made("v"), l2(made("q"))
    logit = {
      n: made(n) @ gate[f"w_{n}"] + gate[f"b_{n}"] for n in ("eta", "alpha")
    }
    eta = config.eta_max * jax.nn.sigmoid(logit["eta"])
    alpha = jax.nn.sigmoid(logit["alpha"])
    beta = None
    if config.momentum != "off":
      beta = jax.nn.sigmoid(gate["b_beta"])
    for role in roles:
      clock = clocks[role]
      clock.W, clock.S = write(
        config.memory, gen.residual, config.generator_rule, clock.anchor,
        clock.W, clock.S, clock.start, k,
        target(config, gen, clock.anchor, v), gen.rate * eta, alpha, beta,
      )  # fmt: skip
    before = main.W
    main.W, main.S = write(
      config.memory, config.residual, config.memory_rule, main.anchor, main.W,
      main.S, main.start, k, target(config, config, main.anchor, v),
      eta, alpha, beta,
    )  # fmt: skip
    seen = {"after": main.W, "before": before, "chunk_start": main.anchor}
    reads.append(forward(config.memory, config.residual, seen[config.read], q))
    for clock in (*clocks.values(), main):
      clock.tick()
  return jnp.stack(reads)
