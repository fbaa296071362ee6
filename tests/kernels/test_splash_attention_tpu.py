"""Models with softmax attention compiled ahead of time for a TPU topology."""

import pytest

from tests.kernels import ahead

pytestmark = ahead.MARKS

_SCRIPT = r"""
import dataclasses, json, re, sys
import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from nl_jax import sharding
from nl_jax.models import cms, lm

arch, sizes = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:2x2").devices
mesh = sharding.mesh(**sizes, devices=devices)
model = lm.LanguageModel(
  arch, width=128, layers=2, heads=2, head_dim=64, vocab_size=320,
  sequence_length=1024, cms=cms.Options(("ffn",), (256,), (0,)),
  mixer=lm.options(arch, dict(window=256) if arch == "samba" else None),
  dtype="bfloat16")
params = jax.eval_shape(model.init, jax.random.key(0))
params = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  params, sharding.param_shardings(params, model.axes(), mesh))
tokens = jax.ShapeDtypeStruct(
  (4, 1024), "int32", sharding=NamedSharding(mesh, sharding.spec("batch")))

def loss(params, tokens, ids):
  return model.apply(params, tokens, segment_ids=ids)[0].mean()

with jax.set_mesh(mesh):
  text = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
text = text.as_text()
calls = [x for x in text.splitlines() if "tpu_custom_call" in x]
print(json.dumps(dict(
  kernels=sorted(re.findall(r"splash_m\w+?_(fwd|dq|dkv)", " ".join(calls))),
  square=len(re.findall(r"\d,(?:512|1024),1024\]", text)),
)))
"""


@pytest.mark.parametrize(
  ("arch", "sizes"),
  [
    ("transformer", dict(fsdp=2, tensor=2)),
    ("samba", dict(fsdp=4)),
    ("transformer", dict(fsdp=2, sequence=2)),
  ],
)
def test_v5e_attends_by_the_kernel(arch, sizes):
  got = ahead.run(_SCRIPT, arch, sizes)
  assert set(got["kernels"]) == {"fwd", "dq", "dkv"}, got
  assert not got["square"], got
