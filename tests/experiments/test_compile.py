"""Compile reports: programs read from their text, slices, meshes, mistakes."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.cli import named
from experiments.compile import __main__ as compile
from nl_jax import build, sharding
from nl_jax.aot import chips, hlo, programs, transfers
from nl_jax.aot import text as text_lib
from tests.experiments import forked

ROOT = pathlib.Path(__file__).parents[2]
MESH = dict(replica=1, fsdp=4, sequence=1, tensor=2)

# As a TPU's compiler writes it, shortened: a loop of 24 turns with a gather
# that runs beside a product (its pieces have one chain_id), a kernel whose
# attributes go over several lines, a sum of which a shard is kept, and a
# batched product as a dilated convolution.
TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%begin (p.0: bf16[8,16]) -> (bf16[8,16], bf16[32,16], u32[]) {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p.0), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}, metadata={op_name="jit(step)/jvp()/while/body/dot"}
  ROOT %custom-call.1 = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%later (p.1: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (p.2: f32[64,4]) -> f32[16,4] {
  %p.2 = f32[64,4]{1,0} parameter(0)
  %constant.9 = s32[] constant(0)
  %all-reduce.1 = f32[64,4]{1,0} all-reduce(%p.2), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp())/while/body/dot"}
  ROOT %dynamic-slice.1 = f32[16,4]{1,0} dynamic-slice(%all-reduce.1, %constant.9, %constant.9), dynamic_slice_sizes={16,4}
}

%body (carry: (s32[], bf16[8,16], f32[64,4])) -> (s32[], bf16[8,16], f32[64,4]) {
  %carry = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[64,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %w = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %g = f32[64,4]{1,0} get-tuple-element(%carry), index=2
  %fusion.1 = (bf16[8,16]{1,0:S(1)}, bf16[32,16]{1,0:S(1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begin, backend_config={"window_config":{"estimated_cycles":"10"}}
  %fusion.2 = bf16[32,16]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%later
  %kernel.1 = f32[8,128]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/jvp()/while/body/pallas_call"}
  %fusion.3 = f32[16,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:S(1)}, f32[64,4]{1,0}) tuple(%next, %w, %g)
}

%condition (carry.1: (s32[], bf16[8,16], f32[64,4])) -> pred[] {
  %end = s32[]{:T(128)} constant(25)
  %carry.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:S(1)}, f32[64,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (w: bf16[8,16], g: f32[64,4], q: f32[4,256,2,32], k: f32[4,256,2,32]) -> f32[64,4] {
  %w.1 = bf16[8,16]{1,0} parameter(0)
  %g.1 = f32[64,4]{1,0} parameter(1)
  %q = f32[4,256,2,32]{3,2,1,0} parameter(2)
  %k = f32[4,256,2,32]{3,2,1,0} parameter(3)
  %first = s32[]{:T(128)} constant(1)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,4]{1,0}) tuple(%first, %w.1, %g.1)
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,4]{1,0}) while(%tuple.2), condition=%condition, body=%body
  %convolution.1 = f32[4,2,256,256]{3,2,1,0} convolution(%q, %k), window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=0b1f_0o1i->01bf
  %all-reduce.2 = f32[] all-reduce(%first), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add
  ROOT %result = f32[64,4]{1,0} get-tuple-element(%while.1), index=2
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def frozen():
  return hlo.count(TPU, MESH)


def test_a_loop_that_begins_at_one_turns_24_times(frozen):
  assert frozen.loops == (24,) and frozen.unknown == ("kernel kernel.1",)
  assert frozen.cycles == 24 * 10


def test_transfers_count_by_the_trips_of_their_loop(frozen):
  found = {c.kind: c for c in frozen.collectives if c.place != "unnamed"}
  gather = found["all-gather"]
  # Begun once a turn; the later piece is the same gather.
  assert (gather.count, gather.axes, gather.hidden) == (24, "fsdp", True)
  assert gather.place == "forward, in a loop"
  assert gather.payload == 24 * 32 * 16 * 2
  assert gather.wire == gather.payload * 3 / 4
  scatter = found["reduce-scatter"]
  assert (scatter.count, scatter.axes, scatter.hidden) == (24, "fsdp", False)
  assert scatter.place == "backward, in a loop"
  assert scatter.payload == 24 * 64 * 4 * 4
  assert "all-reduce" not in found
  last = [c for c in frozen.collectives if c.kind == "all-reduce"]
  assert [(c.count, c.axes, c.wire) for c in last] == [
    (1, "fsdp,tensor", 2 * 4 * 7 / 8)
  ]


def test_a_dilated_convolution_costs_its_products_only(frozen):
  assert frozen.flops == 2 * 4 * 2 * 256 * 256 * 32


def test_memory_on_the_chip_is_not_main_memory():
  array = lambda layout: text_lib._array("bf16", "8,16", layout)
  assert hlo._outside([array("1,0:T(8,128)(2,1)")]) == 256
  assert hlo._outside([array("1,0:T(8,128)(2,1)S(1)")]) == 0


@pytest.mark.parametrize("groups,axes,size", [
  ("replica_groups=[4,2]<=[8]", "tensor", 2),
  ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp", 4),
  ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tensor", 2),
  ("replica_groups={{0,4},{2,6}}", "fsdp", 2),
  ("replica_groups={}", "fsdp,tensor", 8),
  ("source_target_pairs={{0,2},{2,4}}", "fsdp", 2),
])  # fmt: skip
def test_groups_of_devices_are_named_by_axes(groups, axes, size):
  ins = text_lib.Instruction("x", "all-reduce", (), (), groups, False)
  assert transfers._group(ins, MESH) == (axes, size)


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.count("nothing", MESH)


@pytest.fixture(scope="module")
def program():
  """Two nested scans over a product whose sum is over `tensor`."""
  mesh = sharding.mesh(fsdp=4, tensor=2)
  put = lambda *axes: NamedSharding(mesh, P(*axes))

  def f(x_BxD, w_DxD):
    def inner(x, _):
      y = jax.lax.with_sharding_constraint(jnp.tanh(x @ w_DxD), put("fsdp"))
      return jax.lax.with_sharding_constraint(y, put("fsdp", "tensor")), None

    def outer(x, _):
      return jax.lax.scan(inner, x, None, length=3)[0], None

    return jax.lax.scan(outer, x_BxD, None, length=5)[0]

  like = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=put(*axes)
  )
  lowered = jax.jit(f).lower(
    like((16, 64), "fsdp", "tensor"), like((64, 64), "tensor", None)
  )
  return lowered.compile(), dict(mesh.shape)


def test_nested_loops_of_a_real_program(program):
  compiled, mesh = program
  counts = hlo.count(compiled.as_text(), mesh)
  assert sorted(counts.loops) == [3, 5]
  # A device has 4 rows and half of the 64 terms.
  assert counts.flops == 15 * 2 * 4 * 32 * 64
  (reduce,) = (c for c in counts.collectives if c.axes == "tensor")
  assert reduce.kind == "all-reduce" and reduce.count == 15
  assert reduce.payload == 15 * 4 * 64 * 4 == reduce.wire
  # What the compiler itself counts takes each loop once.
  assert compiled.cost_analysis()["flops"] < counts.flops


def test_a_train_step_has_the_products_of_its_formula():
  config = build.resolve(named.load_config("transformer_tiny:smoke"))
  net = build.model(config)
  params = jax.eval_shape(net.init, jax.random.key(0))
  B, T = 4, 64
  tokens = jax.ShapeDtypeStruct((B, T), np.int32)
  forward = lambda params, tokens: net.apply(params, tokens)[0]
  text = jax.jit(forward).lower(params, tokens).compile().as_text()
  counts = hlo.count(text, dict.fromkeys(sharding.AXES, 1))
  D = net.width
  matrices = net.layers * (4 * D * D + 3 * D * net.cms.widths[0])
  attention = net.layers * 2 * T * D
  expected = 2 * B * T * (matrices + attention + D * net.vocab_size)
  assert not counts.collectives
  np.testing.assert_allclose(counts.flops, expected, rtol=1e-6)


@pytest.mark.parametrize("text,sentence", [
  ("v7x:2x2", r"v7x is written tpu7x.*known: v4, v5e"),
  ("v5p:4x4", "a slice of v5p has 3 sides; write v5p:4x4x4"),
  ("v5e:16", "has 2 sides"),
  ("v5e", "has 2 sides"),
  ("v5e:0x4", "has 2 sides"),
])  # fmt: skip
def test_a_slice_that_there_is_not(text, sentence):
  with pytest.raises(ValueError, match=sentence):
    chips.kind(text)


def test_a_slice_is_found_by_its_chip():
  for name, chip in chips.CHIPS.items():
    assert chips.kind(f"{name}:{chip.slice}") == name
    assert chip.slice.count("x") + 1 == chip.sides


@pytest.mark.parametrize(
  "text",
  ["fsdp:2", "data=2", "fsdp=2,fsdp=4", "tensor=x", "tensor=", "fsdp=2,"],
)
def test_a_mesh_that_is_none(text):
  with pytest.raises(ValueError, match="--mesh=.*axes: replica, fsdp"):
    programs.asked_mesh(text)


def test_without_the_compiler_the_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu.*pip install -e \.\[tpu\]"):
    programs.environment(tmp_path)


def test_a_roofline_is_bytes_and_products_over_the_makers_rates():
  move = transfers.Collective("all-gather", "fsdp", "", False, 1, 0, 4e8)
  counts = hlo.Counts(197e9, 819e6, 1503e3, (move,), (), ())
  chip = chips.CHIPS["v5e"]
  found = chips.roofline(counts, chip, 1)
  np.testing.assert_allclose(found, (1e-3, 1e-3, 4e-3, 1e-3))
  assert math.isclose(found.least, 4e-3) and math.isclose(found.most, 6e-3)
  # Two devices of a chip share its rates.
  assert chips.roofline(counts, chip, 2).products == 2e-3


@pytest.mark.parametrize("memory,remat,knobs,words", [
  (dict(parameters=9, optimizer=9, temporaries=2), "layer", (),
   ("mesh.fsdp", "more chips")),
  (dict(parameters=1, optimizer=1, temporaries=9), "layer",
   ("chunk_memory", "remat_group", "read"),
   ("train.accumulate=4", "remat_group", "chunk_memory", "mesh.fsdp")),
  (dict(parameters=1, optimizer=1), "none", (), ("train.remat=layer",)),
])  # fmt: skip
def test_what_does_not_fit_says_which_knob(memory, remat, knobs, words):
  advice = chips.advice(memory, 2, remat, knobs)
  for word in words:
    assert word in advice
  assert ("train.remat" in advice) == (remat == "none")


def test_a_refused_program_is_a_line_of_the_table():
  row = dict(program="train", capacity=2**34, fits=False, advice="turn it",
             memory=dict(parameters=2**30, optimizer=2**31),
             refused="RESOURCE_EXHAUSTED: too much")  # fmt: skip
  report = dict(topology="v5e:2x2", mesh=dict(fsdp=4, tensor=1),
                programs=[row])  # fmt: skip
  failed = dict(topology="v4:4x4x4", error="a sentence")
  text = compile.table([report, failed])
  assert (
    "| fsdp 4 | train | 3.00 GiB | - | does not fit 16.00 GiB: turn it"
    in (text)
  )
  assert "| v4:4x4x4 | failed: a sentence |" in text
  assert "too much" in compile.transfers(row)


SLICE = """HloModule jit_step

%copied (p.0: f32[64,4]) -> f32[16,4] {
  %p.0 = f32[64,4]{1,0} parameter(0)
  ROOT %slice.1 = f32[16,4]{1,0:S(1)} slice(%p.0), slice={[0:16], [0:4]}
}

ENTRY %main (p: f32[64,4]) -> f32[16,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %start = ((f32[64,4]{1,0}), f32[16,4]{1,0:S(1)}, s32[]{:S(2)}) async-start(%p), calls=%copied
  ROOT %done = f32[16,4]{1,0:S(1)} async-done(%start)
}
"""  # noqa: E501


def test_a_slice_reads_only_itself():
  onto_the_chip = hlo.count(SLICE, MESH)
  assert onto_the_chip.hbm_bytes == 16 * 4 * 4
  beside = hlo.count(SLICE.replace(":S(1)", ""), MESH)
  assert beside.hbm_bytes == 2 * 16 * 4 * 4


OFFLOADED = """HloModule jit_step

%called (p.0: bf16[8,16]) -> bf16[32,16] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  ROOT %gather = bf16[32,16]{1,0} all-gather(%p.0), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, backend_config={"estimated_cycles":"9223372036854775807"}
}, execution_thread="sparsecore"

%async (p.1: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %custom = bf16[32,16]{1,0} custom-call(%p.1), custom_call_target="sparse_core", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %update = ((bf16[8,16]{1,0}), bf16[32,16]{1,0}, (s32[8]{0})) async-update(%start, %p)
  ROOT %done = bf16[32,16]{1,0} async-done(%update)
}
"""  # noqa: E501


def test_a_gather_of_a_sparse_core_is_counted_once_and_hidden():
  counts = hlo.count(OFFLOADED, MESH)
  (found,) = counts.collectives
  assert (found.kind, found.axes, found.hidden) == ("all-gather", "fsdp", True)
  assert (found.count, found.payload) == (1, 32 * 16 * 2)
  assert counts.hbm_bytes == (8 + 32) * 16 * 2 and not counts.cycles


MISTAKES = (
  ([], "give one of --topology"),
  (["--topology=v5e:2x2", "--all"], "give one of --topology"),
  (["--topology=v9:2x2"], "unknown chip 'v9'"),
  (["--topology=v5e:2x2", "--programs=serve"], "--programs must be of train"),
  (["--topology=v5e:2x2", "--output=."], "already exists"),
  (["--plot=a.json"], "--plot draws into a new file"),
)


def test_mistakes_end_in_one_sentence(tmp_path):
  commands = [
    ["compile", "--config=transformer_tiny", *args] for args, _ in MISTAKES
  ]
  for done, (_, sentence) in zip(forked.run(commands, tmp_path), MISTAKES):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and sentence in line


with_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: no ahead-of-time TPU compiler",
)


@pytest.mark.tpu_aot
@with_libtpu
def test_sigterm_ends_it_without_a_trace():
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.compile", "--topology=v5e:2x2",
     "--config=transformer_tiny:smoke"],
    stderr=subprocess.PIPE, text=True, cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )  # fmt: skip
  said = [process.stderr.readline(), process.stderr.readline()]
  assert "loading JAX" in said[0] and "compiling the train step" in said[1]
  process.terminate()
  _, rest = process.communicate(timeout=60)
  assert process.returncode in (-15, 143) and not rest, rest


@pytest.mark.tpu_aot
@with_libtpu
def test_tiny_steps_compile_for_a_slice(tmp_path):
  path = tmp_path / "report.json"
  done = subprocess.run(
    [sys.executable, "-m", "experiments.compile", "--mesh=fsdp=2,tensor=2",
     "--config=transformer_tiny:smoke", "--topology=v5e:2x2",
     f"--output={path}"],
    capture_output=True, text=True, cwd=ROOT, timeout=240,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert "| v5e:2x2 | fsdp 2 tensor 2 | train |" in done.stdout
  (report,) = json.loads(path.read_text())["reports"]
  train, decode = report["programs"]
  for row in (train, decode):
    assert row["fits"] and row["memory"]["total"] < row["capacity"] == 2**34
    assert row["flops"] > 0 and not row["unknown"]
    assert "tensor" in {c["axes"] for c in row["collectives"]}
    estimate = row["estimate"]
    assert 0 < estimate["least"] <= estimate["most"]
    assert row["schedule"]["kernels"] == 0 < row["schedule"]["operations"]
    assert "CMS" in row["schedule"]["parts"]
  gathers = lambda row: sum(
    c["wire"] for c in row["collectives"] if "fsdp" in c["axes"]
  )
  # Weights are whole over `fsdp` where a token is read at a time.
  assert gathers(train) > 100 * gathers(decode)
  assert train["memory"]["optimizer"] > 1.9 * train["memory"]["parameters"]
  assert train["flops"] > 3 * decode["flops"]
