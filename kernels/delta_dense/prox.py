"""The exact proximal step of delta gradient descent (paper eq. 56).

    W+ = argmin  decay/2 |X W|^2 - <X W, U> + |W - W_t|^2 / (2 eta)
       = (I + eta decay X^T X)^-1 (W_t + eta X^T U)

and for one token W - eta' (decay x^T x W - x^T u), eta' = eta / (1 + eta decay
|x|^2). Deviation: eq. 57 prints eta / (1 + eta), right for |x| = 1 only.
"""

import jax
import jax.numpy as jnp

FORMS = ("prox", "linear", "sequential")


def delta_prox(
  kernel: jax.Array,
  x: jax.Array,
  u: jax.Array,
  eta: jax.typing.ArrayLike,
  *,
  decay: jax.typing.ArrayLike = 1.0,
  form: str = "prox",
) -> jax.Array:
  """One step of DGD on a chunk of tokens, for fast weights.

  Args:
    kernel: (..., c, r).
    x: (..., T, c) inputs.
    u: (..., T, r): minus the gradient at the outputs, or the values.
    eta: step size.
    decay: weight of the delta term.
    form: "prox" is exact and stable for every eta; "linear" its first order,
      stable for eta decay lambda_max(X^T X) <= 2; "sequential" a scan of exact
      steps, one a token.

  Returns:
    The new kernel.

  Raises:
    ValueError: an unknown form.
  """
  if form not in FORMS:
    raise ValueError(f"form must be one of {FORMS}, got {form!r}")
  dtype = jnp.promote_types(kernel.dtype, jnp.float32)
  W, x, u = (a.astype(dtype) for a in (kernel, x, u))
  step = {"prox": _prox, "linear": _linear, "sequential": _sequential}[form]
  return step(W, x, u, eta, decay).astype(kernel.dtype)


def _prox(W, x, u, eta, decay):
  T, c = x.shape[-2:]
  xt = x.mT
  V = W + eta * (xt @ u)
  rate = eta * decay
  n = min(T, c)
  eye = jnp.eye(n, dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (n, n))
  if c <= T:
    return jnp.linalg.solve(eye + rate * (xt @ x), V)
  return V - rate * (xt @ jnp.linalg.solve(eye + rate * (x @ xt), x @ V))


def _linear(W, x, u, eta, decay):
  return W - eta * (x.mT @ (decay * (x @ W) - u))


def _sequential(W, x, u, eta, decay):
  def token(W, xu):
    x, u = xu
    rate = eta / (1 + eta * decay * jnp.sum(x * x, axis=-1))
    error = decay * jnp.einsum("...c,...cr->...r", x, W) - u
    step = x[..., :, None] * error[..., None, :]
    return W - rate[..., None, None] * step, None

  tokens = jax.tree.map(lambda a: jnp.moveaxis(a, -2, 0), (x, u))
  return jax.lax.scan(token, W, tokens)[0]
