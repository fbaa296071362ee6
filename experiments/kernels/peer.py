"""Compiles deltanet-tpu's kernels; run by a Python that has it, as a script.

    <python> experiments/kernels/peer.py v5e:2x2

Only its public functions are called (github.com/maelie-labs/deltanet-tpu).
Bundles times the steps of each kernel's grid, of 64 tokens and a head. No
module of the project is loaded but the reader of the compiler's files.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import dump

sys.path.pop(0)  # Commands beside this file have names of other packages.

_B, _T, _H, _K = 2, 512, 4, 128
_TOKENS = 64  # Of the figures.
_CHUNK = 128  # Its own default.


def main(topology: str) -> None:
  """Prints a table of a chip."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",
      TPU_WORKER_HOSTNAMES="localhost",
      TPU_ACCELERATOR_TYPE="v5litepod-4",
      LIBTPU_INIT_ARGS=dump.arguments(folder),
    )
    lines = [
      f"deltanet-tpu {metadata.version('deltanet-tpu')} on {topology}, K V "
      f"{_K}, chunks of {_CHUNK}, jax {metadata.version('jax')}, libtpu "
      f"{metadata.version('libtpu')}\n",
      f"| function | way | kernels | bundles of {_TOKENS} tokens and a head |",
      "|---|---|---|---|",
    ]
    import deltanet_tpu
    import jax

    # It asks for the chip that is here, and one is meant that is not.
    jax.default_backend = lambda: "tpu"
    for function in ("chunk_gdn", "chunk_delta_rule"):
      made = getattr(deltanet_tpu, function)
      for way, run in _ways(made, function):
        count, bundles = _compiled(run, function, topology, folder)
        lines.append(f"| {function} | {way} | {count} | {bundles:,.0f} |")
  print("\n".join(lines))


def _ways(
  made: Callable[..., Any], function: str
) -> list[tuple[str, Callable[..., Any]]]:
  """Forward alone, and a gradient, which runs it too."""
  import jax
  import jax.numpy as jnp

  def forward(*inputs: Any, inference: bool = True) -> Any:
    return made(*inputs, chunk_size=_CHUNK, is_inference=inference)

  def gradient(*inputs: Any) -> Any:
    loss = lambda *x: jnp.sum(forward(*x, inference=False).astype(jnp.float32))
    return jax.grad(loss, tuple(range(len(inputs))))(*inputs)

  return [("forward", forward), ("forward and backward", gradient)]


def _compiled(
  run: Callable[..., Any], function: str, topology: str, folder: pathlib.Path
) -> tuple[int, float]:
  """(kernels, bundles of `_TOKENS` tokens and a head)."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  found = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = Mesh(np.array(found[:1]), ("x",))
  like = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P())
  )
  wide = like((_B, _T, _H, _K), jnp.bfloat16)
  one = like((_B, _T, _H), jnp.float32)
  gates = (one, one) if function == "chunk_gdn" else (one,)
  inputs = (wide, wide, wide, *gates)
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(run)(*inputs).jaxpr
    text = jax.jit(run).lower(*inputs).compile().as_text()
  schedules = dump.read(folder)
  grids = [
    (e.params["name"], int(np.prod(e.params["grid_mapping"].grid)))
    for e in _kernels(jaxpr)
  ]
  calls = [n for n in schedules if _is_kernel(n, text)]
  total = 0
  for name, steps in grids:
    (call,) = (n for n in calls if name in n)
    total += schedules[call].bundles * steps
  return len(grids), total / (_B * _H * _T / _TOKENS)


def _is_kernel(name: str, text: str) -> bool:
  """Whether an instruction is a kernel's call."""
  lines = (x for x in text.splitlines() if f"%{name} = " in x)
  return any("tpu_custom_call" in line for line in lines)


def _kernels(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _kernels(inner)


if __name__ == "__main__":
  main(sys.argv[1])
