"""The training state: a plain dict {"params", "opt", "step", "skipped"}.

Where rows of training are streams it also has "carried" (`train.carry`).

`step` counts updates asked for, `skipped` those of them that were not finite
and left parameters and optimizer as they were; both int32 scalars.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nl_jax import sharding
from nl_jax.train import carry

CARRIED = "carried"
State = dict[str, Any]


def abstract(
  model: Any,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  streams: int = 0,
) -> State:
  """Shapes, dtypes and shardings of the state; nothing is computed.

  Args:
    model: `init(key) -> params`.
    tx: the optimizer.
    mesh: where the state lives.
    streams: rows that carry their memories; 0: none does.

  Returns:
    The state as a tree of `jax.ShapeDtypeStruct` with shardings.

  Raises:
    ValueError: a parameter that the mesh does not divide.
  """
  params = jax.eval_shape(model.init, jax.random.key(0))
  everywhere = sharding.replicated(mesh)
  by_param = sharding.param_shardings(params, model.axes(), mesh)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = {
    "params": params,
    "opt": jax.eval_shape(tx.init, params),
    "step": scalar,
    "skipped": scalar,
  }
  shardings = {
    "params": by_param,
    "opt": sharding.state_shardings(tx, params, by_param, everywhere),
    "step": everywhere,
    "skipped": everywhere,
  }
  if streams:
    begin = lambda params: carry.begin(model, params, streams)
    shapes[CARRIED] = jax.eval_shape(begin, params)
    shardings[CARRIED] = carry.shardings(shapes[CARRIED], mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def create(
  model: Any,
  tx: optax.GradientTransformation,
  like: State,
  *,
  seed: int,
  params: Any = None,
) -> State:
  """Makes the state before the first step, sharded where it is made.

  Args:
    model: `init(key) -> params`.
    tx: the optimizer.
    like: of `abstract`.
    seed: decides the parameters, whatever the mesh.
    params: parameters to start from instead.
  """

  def begin(params: Any) -> State:
    zero = jnp.zeros((), jnp.int32)
    state = {
      "params": params,
      "opt": tx.init(params),
      "step": zero,
      "skipped": zero,
    }
    if CARRIED in like:
      streams = like[CARRIED]["document_B"].shape[0]
      state[CARRIED] = carry.begin(model, params, streams)
    return state

  if params is not None:
    return jax.jit(begin, out_shardings=shardings(like))(params)
  draw = lambda key: begin(model.init(key))
  return jax.jit(draw, out_shardings=shardings(like))(jax.random.key(seed))


def with_carried(model: Any, state: State, like: State) -> State:
  """A state whose streams, if it has any, have read nothing.

  Args:
    model: of the parameters.
    state: without what streams carry.
    like: of `abstract`.
  """
  if CARRIED not in like:
    return state
  streams = like[CARRIED]["document_B"].shape[0]
  begin = jax.jit(
    lambda params: carry.begin(model, params, streams),
    out_shardings=shardings(like)[CARRIED],
  )
  return {**state, CARRIED: begin(state["params"])}


def shardings(like: State) -> State:
  """The shardings of an abstract state."""
  return jax.tree.map(lambda x: x.sharding, like)
