"""Walks compiled ahead of time for a TPU topology, forward and backward."""

import pytest

from tests.kernels import ahead

pytestmark = ahead.MARKS

_SCRIPT = r"""
import json, re, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nl_jax import sharding
from nl_jax.kernels import walk
from tests.kernels import walk_bodies

kind, dtype, sequence = json.loads(sys.argv[1])
B, N, C, H, K, M = 4, 32, 16, 8, 64, 128
devices = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:2x2").devices
mesh = sharding.mesh(
  fsdp=2 // sequence, sequence=sequence, tensor=2, devices=devices)
spec = P("fsdp", "sequence", "tensor")

def put(spec, dtype, **shapes):
  place = NamedSharding(mesh, spec)
  return {k: jax.ShapeDtypeStruct(v, dtype, sharding=place)
          for k, v in shapes.items()}

own = lambda **shapes: put(P("fsdp", "tensor"), "float32", **{
  k: (B, H, *v) for k, v in shapes.items()})
start = lambda **shapes: put(P("tensor"), "float32", **{
  k: (H, *v) for k, v in shapes.items()})
if kind == "linear":
  slow = start(w=(K, K), b=(1, 1))
  state = walk.State(own(w=(K, K)), own(s=(K, K)))
else:
  slow = start(w_in=(K, M), w_out=(M, K))
  state = walk.State(own(w_in=(K, M), w_out=(M, K)), {})
wide = (B, N * C, H * K)
xs = put(spec, dtype, q=wide, k=wide, v=wide, la=(B, N * C, H))
places = walk.Places(**put(
  P("fsdp"), "bool", real=(B, N, C), resets=(B, N), closes=(B, N)))

def loss(slow, xs, state, places):
  outs = walk.walk(
    getattr(walk_bodies, kind), slow, xs, places, state=state, spec=spec)
  return sum((x ** 2).sum() for x in jax.tree.leaves(outs[:3]))

with jax.set_mesh(mesh):
  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
    slow, xs, state, places).compile().as_text()
calls = re.findall(r"%\w*(walk_(?:fwd|bwd))[_.\d]* = .*tpu_custom_call", text)
tokens = N * C
print(json.dumps(dict(
  kernels=sorted(calls),
  collectives=re.findall(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\(", text),
  loops=text.count(" while("),
  moved=re.findall(rf"\[\d+,{tokens},\d+\]\S* (?:copy|transpose)\(", text),
)))
"""


@pytest.mark.parametrize(
  ("kind", "dtype"), [("linear", "bfloat16"), ("mlp", "float32")]
)
def test_v5e_walks_by_the_kernels(kind, dtype):
  """One each way, chosen by itself; no loop, no copy of what is read."""
  got = ahead.run(_SCRIPT, kind, dtype, 1)
  assert got == dict(
    kernels=["walk_bwd", "walk_fwd"],
    collectives=["all-reduce"],  # The gradient of slow parameters.
    loops=0,
    moved=[],
  )


def test_v5e_walks_pieces_of_rows_by_the_kernels():
  """A loop over rows each way, with the kernel in it and what it sends."""
  made = ahead.run(_SCRIPT, "linear", "bfloat16", 2)
  assert made["kernels"] == ["walk_bwd", "walk_fwd"]
  assert made["loops"] == 2
  sent = set(made["collectives"])
  assert "collective-permute" in sent
  assert sent <= {"collective-permute", "all-reduce"}
