"""M3, multi-scale momentum Muon (paper Algorithm 1, eq. 75).

With t = 1, 2, ... and everything zero at first:

    m1 <- b1 m1 + (1 - b1) g                      (sums: m1 + b1 g)
    D  <- NS(m1) + alpha o2
    every f steps: m2 <- b3 m2 + (1 - b3) mean of the last f gradients
                   o2 <- NS(m2)
    None:  U = D
    ortho: nu <- b2 nu + (1 - b2) D^2;  R = D / (sqrt(nu) + eps);
           U = R |D| / |R|, per matrix
    grad:  nu <- b2 nu + (1 - b2) g^2;  U = D / (sqrt(nu) + eps)

Deviation: the paper prints sums, a second moment of raw gradients and chunks of
f + 1 gradients; `m3_paper` follows it but for the f + 1, the defaults do not.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels.orthogonalize import coefficients, stack
from nl_jax.optim import _adam_memory, _checks, _dims, _dtypes, _newton_schulz

A = jax.typing.ArrayLike
Tree = Any


class ScaleByM3State(NamedTuple):
  """State of `scale_by_m3`; fields that a configuration lacks are `()`.

  Attributes:
    count: int32 scalar.
    m1: fast momentum, like the parameters.
    m2: slow momentum.
    slow_sum: gradients since the slow momentum last moved.
    o2: NS(m2), or () with cache_slow=False.
    nu: second moment, real.
  """

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  m1: Tree
  m2: Tree
  slow_sum: Tree
  o2: Tree
  nu: Tree


def scale_by_m3(
  b1: A = 0.8,
  b2: A = 0.95,
  b3: A = 0.9,
  alpha: A | None = 0.1,
  eps: A = 1e-8,
  ns_steps: int = 5,
  slow_every: A = 100,
  *,
  accumulate: Literal["ema", "sum"] = "ema",
  second_moment: Literal["ortho", "grad"] | None = "ortho",
  chunk_reduce: Literal["mean", "sum"] = "mean",
  slow_read: Literal["next", "same"] = "next",
  bias_correction: bool = True,
  nesterov: bool = False,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  cache_slow: bool = True,
  stagger: bool = False,
  dtypes: _dtypes.StateDtypes = _dtypes.StateDtypes(),  # noqa: B008
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Orthogonalised momentum at two time scales; see the module docstring.

  Args:
    b1: decay of the fast momentum; .8 was best on small problems, Muon's own
      is .95.
    b2: decay of the second moment.
    b3: decay of the slow momentum.
    alpha: weight of the slow memory; None leaves it out (Muon).
    eps: added to denominators.
    ns_steps: Newton-Schulz iterations.
    slow_every: steps between two updates of the slow memory; may be traced.
    accumulate: "ema" or "sum" (printed: b1 g, b2 g^2, b3 g are added).
    second_moment: "ortho" of D, "grad" of the gradients (printed), or None.
    chunk_reduce: "mean" or "sum" of the gradients of a chunk.
    slow_read: "next" uses o2 from the step after (Algorithm 1), or "same".
    bias_correction: correct the bias of m1 and nu, with accumulate="ema".
    nesterov: NS(b1 m1 / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)).
    ns: see `NewtonSchulz`.
    cache_slow: keep o2; otherwise it is computed again in every step.
    stagger: groups of equal shapes refresh at different steps.
    dtypes: see `StateDtypes`.
    dims: the matrices; None is (-2, -1) for rank >= 2. Leaves under None take
      the same rule without NS.

  Returns:
    A transformation with state `ScaleByM3State`.

  Raises:
    ValueError: an unknown switch, or sums with nesterov or "ortho".
  """
  _checks.one_of("accumulate", accumulate, ("ema", "sum"))
  _checks.one_of("second_moment", second_moment, ("ortho", "grad", None))
  _checks.one_of("chunk_reduce", chunk_reduce, ("mean", "sum"))
  _checks.one_of("slow_read", slow_read, ("next", "same"))
  coefficients.check(ns.coeffs, ns_steps)
  if accumulate == "sum" and (nesterov or second_moment == "ortho"):
    raise ValueError(
      "accumulate='sum' takes neither nesterov nor second_moment='ortho', got "
      f"{nesterov=} and {second_moment=}"
    )
  ema = accumulate == "ema"
  correct = bias_correction and ema

  def gather(m, x, decay):
    return decay * m + (1 - decay) * x if ema else m + decay * x

  def init(params):
    _checks.inexact(params, "m3")
    _dims.flat(dims, params)
    zeros = lambda make, dtype: jax.tree.map(lambda p: make(p, dtype), params)
    has_slow = alpha is not None
    slow = lambda: zeros(_dtypes.slow, dtypes.slow) if has_slow else ()
    cached = has_slow and cache_slow
    return ScaleByM3State(
      count=jnp.zeros([], jnp.int32),
      m1=zeros(_dtypes.moment, dtypes.m1),
      m2=slow(),
      slow_sum=slow(),
      o2=zeros(_dtypes.moment, dtypes.o2 or dtypes.m1) if cached else (),
      nu=zeros(_dtypes.square, dtypes.nu) if second_moment else (),
    )

  def update(updates, state, params=None, **extra):
    del params, extra
    specs = _dims.flat(dims, updates)
    treedef = jax.tree.structure(updates)
    spec_tree = jax.tree.unflatten(treedef, specs)
    orthogonal = lambda tree: ns.orthogonalize(tree, spec_tree, ns_steps)
    count = optax.safe_increment(state.count)
    g = jax.tree.map(lambda x: x.astype(_dtypes.wide(x)), updates)

    m1 = jax.tree.map(lambda m, x: gather(m, x, b1), state.m1, g)
    D = orthogonal(jax.tree.map(lambda m, x: fast(m, x, count), m1, g))
    m2, slow_sum, o2 = state.m2, state.slow_sum, state.o2
    if alpha is not None:
      before = (m2, o2)
      m2, slow_sum, o2 = refresh(state, g, count, orthogonal, specs)
      m2_read, o2_read = before if slow_read == "next" else (m2, o2)
      slow = o2_read if cache_slow else orthogonal(m2_read)
      D = jax.tree.map(lambda d, o: d + alpha * o, D, slow)
    U, nu = D, state.nu
    if second_moment:
      seen = D if second_moment == "ortho" else g
      nu = jax.tree.map(
        lambda n, x: gather(n, _dtypes.abs_square(x), b2).astype(n.dtype),
        state.nu, seen,
      )  # fmt: skip
      pairs = zip(jax.tree.leaves(D), jax.tree.leaves(nu), specs)
      U = jax.tree.unflatten(treedef, [scaled(*p, count) for p in pairs])
    new = ScaleByM3State(
      count, _dtypes.cast(m1, state.m1), m2, slow_sum, o2, nu
    )
    return _dtypes.cast(U, updates), new

  def fast(m, x, count):
    if not nesterov:
      return _dtypes.bias_correct(m, b1, count) if correct else m
    if not correct:
      return gather(m, x, b1)
    ahead = _dtypes.bias_correct(m, b1, count + 1)
    return b1 * ahead + (1 - b1) * _dtypes.bias_correct(x, b1, count)

  def scaled(d, nu, spec, count):
    nu = _dtypes.bias_correct(nu, b2, count) if correct else nu
    R = d / (_dtypes.safe_sqrt(nu) + eps)
    if second_moment == "grad":
      return R
    return R * _dtypes.safe_divide(_dims.norm(d, spec), _dims.norm(R, spec))

  def refresh(state, g, count, orthogonal, specs):
    """(m2, slow_sum, o2) after this step, one conditional a shape group."""
    slow_sum = jax.tree.map(
      lambda s, x: (s + x).astype(s.dtype), state.slow_sum, g
    )
    treedef = jax.tree.structure(g)
    groups = (
      _shape_groups(jax.tree.leaves(g), specs)
      if stagger
      else ([list(range(treedef.num_leaves))])
    )
    f = slow_every
    columns = (state.m2, slow_sum, state.o2 if cache_slow else state.m2)
    columns = [jax.tree.leaves(c) for c in columns]
    for j, members in enumerate(groups):
      offset = (j * f) // len(groups)
      # The first chunk of a staggered group is short.
      length = jnp.minimum(f, count) if stagger else f

      def go(m2, total, o2, length=length, members=members):
        chunk = (
          total
          if chunk_reduce == "sum"
          else (jax.tree.map(lambda s: s / length, total))
        )
        new = _dtypes.cast([gather(*p, b3) for p in zip(m2, chunk)], m2)
        if cache_slow:
          # Masked in place, so that specs by path stay with their leaves.
          tree = [optax.MaskedNode()] * treedef.num_leaves
          for i, x in zip(members, new):
            tree[i] = x
          o2 = _dtypes.cast(
            jax.tree.leaves(orthogonal(jax.tree.unflatten(treedef, tree))), o2
          )
        return new, jax.tree.map(jnp.zeros_like, total), o2

      taken = [[c[i] for i in members] for c in columns]
      stay = lambda m2, total, o2: (m2, total, o2)
      due = (count + offset) % f == 0
      for column, values in zip(columns, jax.lax.cond(due, go, stay, *taken)):
        for i, x in zip(members, values):
          column[i] = x
    m2, slow_sum, o2 = (jax.tree.unflatten(treedef, c) for c in columns)
    return m2, slow_sum, o2 if cache_slow else ()

  return optax.GradientTransformationExtraArgs(init, update)


def _shape_groups(
  leaves: list[jax.Array], specs: list[_dims.Spec]
) -> list[list[int]]:
  groups: dict[Any, list[int]] = {}
  for i, (x, spec) in enumerate(zip(leaves, specs)):
    key = None if spec is None else tuple(sorted(stack.sizes(x.shape, spec)))
    groups.setdefault(key, []).append(i)
  return list(groups.values())


def _complete(
  matrices: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: A,
  mask: Tree | None,
  consistent_rms: A | None,
  fallback: optax.GradientTransformation | None,
  require_matrix: bool,
  dims: _dims.DimsLike,
) -> optax.GradientTransformationExtraArgs:
  """A rule on the matrices, `fallback` on everything else; see `m3`."""
  tx = optax.chain(
    matrices,
    _dims.scale_by_shape(dims, consistent_rms),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  if fallback is None:
    # AdamW to the last digit, with a finite derivative at a zero gradient.
    fallback = _adam_memory.adam_memory(learning_rate, b2=0.95)
  return _dims.partition(tx, fallback, dims, require_matrix)


def m3(
  learning_rate: optax.ScalarOrSchedule,
  b1: A = 0.8,
  b2: A = 0.95,
  b3: A = 0.9,
  alpha: A | None = 0.1,
  eps: A = 1e-8,
  ns_steps: int = 5,
  slow_every: A = 100,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  consistent_rms: A | None = 0.2,
  fallback: optax.GradientTransformation | None = None,
  require_matrix: bool = False,
  accumulate: Literal["ema", "sum"] = "ema",
  second_moment: Literal["ortho", "grad"] | None = "ortho",
  chunk_reduce: Literal["mean", "sum"] = "mean",
  slow_read: Literal["next", "same"] = "next",
  bias_correction: bool = True,
  nesterov: bool = False,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  cache_slow: bool = True,
  stagger: bool = False,
  dtypes: _dtypes.StateDtypes = _dtypes.StateDtypes(),  # noqa: B008
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """M3 on the matrices, AdamW on everything else.

  `alpha=None` is an AdaMuon.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: decoupled, times the learning rate; on matrices.
    mask: what decays, as in `optax.adamw`.
    consistent_rms: scale updates by this times sqrt(max(c, r)); None scales by
      sqrt(max(1, r / c)).
    fallback: a complete optimizer for the other leaves; None is AdamW (b2 .95)
      at the same learning rate, without weight decay.
    require_matrix: raise if no leaf is a matrix.
    dims: the matrices; None selects them by `matrix_dims_from_paths`.
    b1, b2, b3, alpha, eps, ns_steps, slow_every, accumulate, second_moment,
      chunk_reduce, slow_read, bias_correction, nesterov, ns, cache_slow,
      stagger, dtypes: see `scale_by_m3`.

  Returns:
    A complete optimizer; its update needs params.
  """
  dims = _dims.from_paths(dims)
  matrices = scale_by_m3(
    b1, b2, b3, alpha, eps, ns_steps, slow_every, accumulate=accumulate,
    second_moment=second_moment, chunk_reduce=chunk_reduce,
    slow_read=slow_read, bias_correction=bias_correction, nesterov=nesterov,
    ns=ns, cache_slow=cache_slow, stagger=stagger, dtypes=dtypes, dims=dims,
  )  # fmt: skip
  return _complete(
    matrices, learning_rate, weight_decay, mask, consistent_rms, fallback,
    require_matrix, dims,
  )  # fmt: skip


def muon(
  learning_rate: optax.ScalarOrSchedule,
  b1: A = 0.8,
  ns_steps: int = 5,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  consistent_rms: A | None = 0.2,
  fallback: optax.GradientTransformation | None = None,
  require_matrix: bool = False,
  nesterov: bool = False,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  mu_dtype: jax.typing.DTypeLike | None = None,
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Muon: M3 without its slow memory and second moment.

  Args:
    learning_rate: a number or a schedule.
    mu_dtype: of the momentum, None as the parameters.
    b1, ns_steps, weight_decay, mask, consistent_rms, fallback, require_matrix,
      nesterov, ns, dims: see `m3`.
  """
  dims = _dims.from_paths(dims)
  matrices = scale_by_m3(
    b1, alpha=None, second_moment=None, ns_steps=ns_steps, nesterov=nesterov,
    ns=ns, dtypes=_dtypes.StateDtypes(mu_dtype), dims=dims,
  )  # fmt: skip
  return _complete(
    matrices, learning_rate, weight_decay, mask, consistent_rms, fallback,
    require_matrix, dims,
  )  # fmt: skip


def m3_paper(
  learning_rate: optax.ScalarOrSchedule,
  b1: A = 0.9,
  b2: A = 0.999,
  b3: A = 0.9,
  alpha: A = 1.0,
  eps: A = 1e-8,
  ns_steps: int = 5,
  slow_every: A = 100,
  *,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Algorithm 1 as printed: sums, second moment of gradients, no corrections.

  Its step shrinks like 1 / sqrt(t) and grows like 1 / |g|: for comparison.

  Args:
    learning_rate: a number or a schedule; 3-4 decades below that of `m3`.
    dims: the matrices; None is (-2, -1) for rank >= 2.
    b1, b2, b3, alpha, eps, ns_steps, slow_every, ns: see `scale_by_m3`.
  """
  return optax.chain(
    scale_by_m3(
      b1, b2, b3, alpha, eps, ns_steps, slow_every, accumulate="sum",
      second_moment="grad", chunk_reduce="sum", slow_read="next",
      bias_correction=False, ns=ns, dims=dims,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )  # fmt: skip
