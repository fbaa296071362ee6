"""Sharded Newton-Schulz compiled ahead of time for a TPU topology."""

import pytest

from tests.kernels import ahead

pytestmark = ahead.MARKS

_SCRIPT = r"""
import json, re, sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nl_jax.kernels import orthogonalize as ops

shape, dtype = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:4x4")
mesh = Mesh(np.array(topology.devices), ("fsdp",))
spec = P(None, "fsdp", None)
x = jax.ShapeDtypeStruct(
  shape, "float32", sharding=NamedSharding(mesh, spec))
with jax.set_mesh(mesh):
  f = lambda x: ops.orthogonalize(
    x, ns_dtype=dtype, sharding=ops.NSSharding(("fsdp",), spec))
  compiled = jax.jit(f, out_shardings=x.sharding).lower(x).compile()
text = compiled.as_text()
count = lambda k: len(re.findall(r" %s(?:-start)?\(" % k, text))
kinds = ("all-to-all", "all-gather", "all-reduce", "collective-permute")
temp = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps({"temp": temp / 2**20, **{k: count(k) for k in kinds}}))
"""


@pytest.mark.parametrize(
  ("shape", "dtype", "mib"),
  [
    ((16, 2048, 8192), "float32", 72),
    ((24, 2048, 8192), "bfloat16", 72),
  ],
)
def test_v5e_needs_two_all_to_alls(shape, dtype, mib):
  got = ahead.run(_SCRIPT, shape, dtype)
  assert got["all-to-all"] == 2, got
  assert sum(v for k, v in got.items() if k != "temp") == 2, got
  assert got["temp"] <= mib, got
