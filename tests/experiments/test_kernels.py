"""Estimates of kernels: schedules read, tables, gates, mistakes, the check."""

import copy
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.kernels import check, compile, dump, precision, table, walks
from nl_jax.aot import hlo, programs
from nl_jax.kernels.walk import pallas, plans
from tests.experiments import forked

ROOT = pathlib.Path(__file__).parents[2]

ANALYSIS = """Schedule analysis:
\ttotal scheduled bundles:    4
\tempty scheduled bundles:    1
\tnon empty scheduled bundles: 3
"""
USE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
4 0 2 0 0 0 1 1 1 0
2 3 2 0 0 0 0 1 0 0
0 0 0 0 0 0 0 0 0 0
"""


def test_a_schedule_is_read_once(tmp_path):
  write = lambda name, text: (tmp_path / name).write_text(text)
  write("17-jvp_walk_fwd_.1-01-schedule-analysis_final_bundles.txt", ANALYSIS)
  write("17-jvp_walk_fwd_.1-00-final_hlo-static-per-bundle-utilization.txt",
        USE)  # fmt: skip
  write("17-jvp_walk_fwd_.1-02-final_bundles.txt", "code")
  write("17-copy.3-01-schedule-analysis_final_bundles.txt", "nothing")
  write("17-TLP-hlo.txt", "HloModule")
  found = dump.read(tmp_path)
  assert found == {
    "jvp_walk_fwd_.1": dump.Schedule(
      4, 1, dict(MXU=6 / 16, VALU=4 / 16, XLU=0.25, VSTORE=2 / 4), 2 / 4
    )
  }
  assert not list(tmp_path.iterdir())


def test_what_is_no_schedule_is_refused():
  with pytest.raises(ValueError, match="got no bundles"):
    dump.schedule("nothing", USE)


LOOPS = """HloModule jit_backward

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%p)
}

%inner (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %i = s32[] get-tuple-element(%c), index=0
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %fusion.2)
}

%outer (d: (s32[], f32[8])) -> (s32[], f32[8]) {
  %d = (s32[], f32[8]{0}) parameter(0)
  %copy.1 = (s32[], f32[8]{0}) copy(%d)
  ROOT %while.2 = (s32[], f32[8]{0}) while(%copy.1), condition=%go, body=%inner, backend_config={"known_trip_count":{"n":"4"}}
}

%go (e: (s32[], f32[8])) -> pred[] {
  %e = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  %t = (s32[], f32[8]{0}) tuple(%zero, %fusion.1)
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%go, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %while.3 = (s32[], f32[8]{0}) while(%while.1), condition=%go, body=%inner, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %r = f32[8]{0} get-tuple-element(%while.3), index=1
}
"""  # noqa: E501


def test_what_loops_launch_is_counted_by_their_trips():
  loops = hlo.loops(LOOPS)
  assert [[(ins.name, n) for ins, n in loop] for loop in loops] == [
    [("copy.1", 2), ("fusion.2", 8)],
    [("fusion.2", 8)],
  ]
  schedule = dump.Schedule(7, 0, {}, 0.0)
  program = walks.Program(None, None, (), None, 1, 2, 8)
  made = compile._launches(loops[0], {"fusion.2": schedule}, program)
  assert made == dict(operations=10 / 8, cycles=8 * 30 / 16, bundles=8 * 7 / 16)


@pytest.fixture(scope="module")
def delta():
  """DeltaNet's walk at the scale 1b3 as a v5e has it; this is none."""
  (body,) = walks.of_config("deltanet_1b3")
  assert body.how is None and "needs a TPU" in body.call.reason
  call = body.call
  kernel = plans.Kernel(call.body, call.policy, call.name, interpret=True)
  how, need = plans.plan(kernel, call.slow, call.xs, call.places, call.state)
  return body._replace(how=how, need=need)


def test_a_config_s_walk_is_known_by_shapes(delta):
  assert (delta.sizes, delta.chunk, delta.chunks) == ((128, 128), 64, 64)
  assert delta.heads == 16 and delta.how.heads in walks.step_heads(delta)


def test_walks_that_read_other_types_are_two(delta):
  wide = lambda x: jax.ShapeDtypeStruct(x.shape, np.float32)
  call = delta.call._replace(xs=jax.tree.map(wide, delta.call.xs))
  of = walks.digest
  assert of(delta) == of(delta) != of(delta._replace(call=call))


def test_the_products_of_the_delta_rule(delta):
  d, C = 128, 64
  forward, backward = walks.products_flops(delta)
  # By the algorithm alone, which inverts blocks of 8 without products and then
  # doubles them; documents inside a chunk and whole triangles come on top.
  least = C * (6 * d * d + 8 * C * d + 4 * C * C * 3)
  assert least <= forward <= 1.25 * least
  assert 2 * forward < backward < 3 * forward


def test_bytes_of_main_memory_are_those_of_the_blocks(delta):
  call = delta.call._replace(implementation="pallas_interpret")
  body = delta._replace(call=call)
  device = jax.devices()[:1]
  mesh = jax.sharding.Mesh(device, ("x",))
  program = walks.program(body, "pallas_interpret", mesh)
  assert program.heads == 2 * body.how.heads and program.rows == 2
  found = walks.moved(body, program.forward, program.inputs)
  ((name, moved),) = found.items()
  assert name.endswith("_fwd")
  C, K, H = 64, 128, body.heads
  read = sum(
    C * (x.shape[-1] // H) * x.dtype.itemsize for x in jax.tree.leaves(call.xs)
  )
  # The outputs, float32; a word and the documents' ids a step.
  step = (4 + 4 * C) / body.how.heads
  assert moved.along == read + C * K * 4 + step
  state = K * K * 4
  assert 3 * state <= moved.still <= 3.1 * state  # In, out, the last edge.
  assert moved.of_chunk(64) == moved.along + moved.still / 64


def row(**changed):
  kernel = lambda bundles: dict(bundles=bundles, empty=0.0, spills=0.5,
                                hbm=8190.0, slots=dict(MXU=0.5))  # fmt: skip
  return dict(
    config="a_1b3", body="walk", K=64, M=64, C=16, heads=8, chunks=256,
    reason=None, chip="v5e", step=4, save=1, vmem=2**20, vmem_limit=2**22,
    digest="one", policy="lean",
    flops=dict(F=197e6 / 1.503, G=0.0),
    fused=dict(F=kernel(1000.0), S=kernel(1100.0), G=kernel(1503.0),
               seconds=3.0),
    xla=dict(F=dict(operations=40.0, cycles=5000.0, bundles=900.0),
             G=dict(operations=90.0, cycles=9000.0, bundles=2000.0),
             seconds=2.0),
  ) | changed  # fmt: skip


def test_the_share_of_the_limit():
  # F: products of 1/1503 ms over 1000 bundles at 1.503 GHz, the same.
  assert table.limit_share(row(), "F", "v5e") == pytest.approx(1.0)
  # G: 10 ns of bytes over a microsecond.
  assert table.limit_share(row(), "G", "v5e") == pytest.approx(0.01)
  assert table.limit_share(row(), "F", "tpu7x") is None
  # A core has half of a chip's rates.
  made = row(flops=dict(F=459e6 / 2 / 1.75, G=0.0))
  assert table.limit_share(made, "F", "v5p") == pytest.approx(1.0)


def test_configs_of_one_body_share_a_line_and_estimators_a_column():
  same = dict(row(config="b_1b3"))
  del same["fused"], same["xla"]
  none = row(config="c_1b3", digest="two", reason="a single token")
  del none["fused"], none["xla"]
  rows = [row(), same, none]
  lines = table.table(rows, "v5e:2x2").splitlines()
  assert len(lines) == 6 and "a_1b3, b_1b3" in lines[4]
  assert "| 4 of 8 | lean | 1,000 | 1,100 | 1,503 | 0.50 |" in lines[4]
  assert "1 of 4 MiB" in lines[4] and "| 100% | 1% |" in lines[4]
  assert lines[5].endswith("by XLA: a single token |")
  lines = table.xla_table(rows, "v5e:2x2").splitlines()
  assert len(lines) == 5
  assert lines[4] == (
    "| walk | a_1b3, b_1b3 | 40 | 90 | 5,000 | 9,000 | 900 | 2,000 | 2 s |"
  )


@pytest.mark.parametrize("part,key,value,sentence", [
  ("G", "bundles", 1580.0, "G: bundles from 1,503.00 to 1,580.00"),
  ("F", "spills", 0.55, "F: spills and fills a bundle from 0.50 to 0.55"),
  ("S", "hbm", 8000.0, "S: bytes of main memory from 8,190 to 8,000"),
])  # fmt: skip
def test_a_gate_that_fails_is_named(part, key, value, sentence):
  held = table.baseline([row()])
  assert not table.worse([row()], held)
  made = copy.deepcopy(row())
  made["fused"][part][key] = value
  assert table.worse([made], held) == [f"walk of a_1b3, {sentence}"]
  made["fused"][part][key] = {"bundles": 1570.0, "spills": 0.53, "hbm": 8190}[
    key
  ]
  assert not table.worse([made], held)


def test_a_kernel_that_is_gone_or_large_or_new_is_named():
  held = table.baseline([row()])
  (said,) = table.worse([row(vmem=1.1 * 2**20)], held)
  assert said == "walk of a_1b3: VMEM from 1.0 MiB to 1.1 MiB"
  refused = row(reason="its chunk is long")
  del refused["fused"]
  (said,) = table.worse([refused], held)
  assert said.endswith("had kernels, has none: its chunk is long")
  other = [row(body="other"), row(config="b_1b3", digest="two")]
  gone, *new = table.worse(other, held)
  assert gone == "walk of a_1b3: no walk of it any more" and len(new) == 2
  (said,) = table.worse([row(config="new_1b3")], held)
  assert said == "walk of new_1b3: not in the baseline"


def test_heads_that_spare_more_than_two_percent_become_a_tile():
  tries = lambda *bundles, **of: row(
    tries=[dict(heads=h, bundles=b) for h, b in zip((2, 4, 8), bundles)]
    + [dict(heads=16, vmem=1)], **of,
  )  # fmt: skip
  tile = dict(
    chip="v5e", name="walk", C=16, K=64, M=64, configs=["a_1b3"], default=4,
    of_default={2: 0.97, 4: 1.0, 8: 1.1},
  )  # fmt: skip
  other = tile | dict(chip="v6e", heads=8)
  made = table.tiles([tries(970.0, 1000.0, 1100.0)], [other])
  assert made == [other, tile | dict(heads=2)]
  # Where the default is as good, the row says so and names no heads.
  (kept,) = table.tiles([tries(985.0, 1000.0, 1100.0)], made[1:])
  assert "heads" not in kept and kept["of_default"][2] == 0.985
  # A row is of all bodies that it fits: one that gets slower forbids it.
  both = [tries(970.0, 1000.0, 900.0),
          tries(500.0, 500.0, 600.0, config="b_1b3", digest="two")]  # fmt: skip
  (shared,) = table.tiles(both, [])
  assert "heads" not in shared and shared["configs"] == ["a_1b3", "b_1b3"]
  assert shared["of_default"] == {2: 1.0, 4: 1.0, 8: 1.2}
  # No row is added of a body whose default was not compiled.
  assert not table.tiles([row(step=16, tries=[])], [])


def test_tiles_that_are_kept_can_be_taken():
  rows = json.loads(plans._TILES.read_text())
  for made in rows:
    key = [made[k] for k in ("name", "C", "K", "M")]
    assert made["of_default"][str(made["default"])] == 1.0, key
    best = min(made["of_default"].values())
    assert ("heads" in made) == (best < 0.98), key
    if "heads" in made:
      assert made["of_default"][str(made["heads"])] == best, key
  keys = [tuple(r[k] for k in table._TILE) for r in rows]
  assert len(set(keys)) == len(keys)


def test_kernels_agree_with_xla():
  name = "hope_linear_tiny"
  line = check.check(name, "float32", "pallas_interpret")
  assert line.holds and line.walks and not line.others, str(line)
  assert str(line).startswith(f"equal {name} float32: {line.walks[0]}: ")
  # A number that is off, or none, is said.
  for wrong in (1e-3, float("nan")):
    off = line._replace(values=wrong)
    assert not off.holds and str(off).startswith("OFF ")
  assert not line._replace(walks=()).holds
  still = line._replace(still=("w_q",))
  assert not still.holds and str(still).endswith("no gradient of w_q")


def test_a_kernel_that_reads_wrong_is_found(monkeypatch):
  # RWKV-7 starts with an output projection of 0, which would hide it.
  right = pallas.walk

  def wrong(*args):
    ys, *rest = right(*args)
    return jax.tree.map(lambda y: y.at[..., ::2].multiply(1.001), ys), *rest

  monkeypatch.setattr(pallas, "walk", wrong)
  line = check.check("rwkv7_tiny", "float32", "pallas_interpret")
  assert line.walks == ("general_delta_rule",) and not line.still, str(line)
  values, gradients = line.bounds
  assert line.values > 3 * values and line.gradients > gradients


def test_keys_that_come_again_at_rate_two_lose_little(monkeypatch):
  """I - 2 k^T k turns around what lies along k, token by token, undamped."""
  monkeypatch.setattr(precision, "_SHAPE", (1, 192, 1, 32))
  run = lambda policy: jax.jit(
    lambda: precision._delta(1.0, 2.0, policy, decays=False)
  )()
  exact, error = run("f32"), precision._error
  lost = {
    policy: [error(x, y) for x, y in zip(run(policy), exact)]
    for policy in ("lean", "lean2")
  }
  assert max(lost["lean2"]) < 1e-2 < 5e-2 < max(lost["lean"])


def test_a_config_without_kernels_says_so():
  line = check.check("memora_tiny", "float32", "pallas_interpret")
  assert line.holds and str(line).startswith("XLA   memora_tiny: ")
  assert "simplex" in line.refused


def test_a_difference_is_relative_to_its_array():
  difference = check._difference
  assert difference([10.0, 1.0], [10.0, 1.5]) == pytest.approx(0.5 / 1.5)
  assert np.isnan(difference([float("nan"), 1.0], [1.0, 1.0]))


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu.*pip install -e \.\[tpu\]"):
    programs.require_compiler()


MISTAKES = (
  ([], "give one of --report"),
  (["--tune", "--check"], "--tune goes alone"),
  (["--check", "--json=a"], "belong to --report"),
  (["--report", "--topology=v9:2x2"], "unknown chip 'v9'"),
  (["--report", "--topology=v5e:2"], "has 2 sides"),
  (["--report", "--config=hop_1b3"], "no config named 'hop_1b3'"),
  (["--report", "--peer=no_python"], "there is no such program"),
  (["--report", "--json=."], "exists; give another"),
)


def test_mistakes_end_in_one_sentence(tmp_path):
  commands = [["kernels", *args] for args, _ in MISTAKES]
  for done, (_, sentence) in zip(forked.run(commands, tmp_path), MISTAKES):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and sentence in line


CONFIG = """from experiments.configs import {name}

def get_config(arg=""):
  config = {name}.get_config("tiny")
  config.model.update(width=128, heads=2, head_dim=64)
  return config
"""


@pytest.mark.tpu_aot
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: no ahead-of-time TPU compiler",
)
@pytest.mark.parametrize("name,forms", [
  ("hope_linear", ("fused", "xla")), ("hope", ("fused",)),
])  # fmt: skip
def test_walks_compile_for_a_chip_both_ways(name, forms, tmp_path):
  path = tmp_path / "small.py"
  path.write_text(CONFIG.format(name=name))
  request = dict(config=str(path), topology="v5e:2x2", forms=forms)
  done = subprocess.run(
    [sys.executable, "-m", "experiments.kernels.compile",
     json.dumps(request)],
    capture_output=True, text=True, cwd=ROOT, timeout=600,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  (made,) = compile.answer(done.stdout)
  assert (made["K"], made["C"], made["heads"]) == (64, 16, 2)
  F, G = made["fused"]["F"], made["fused"]["G"]
  assert 200 < F["bundles"] < G["bundles"] < 20_000
  assert 0 < F["hbm"] < G["hbm"] and made["vmem"] < made["vmem_limit"]
  for kernel in (F, G):
    assert set(kernel["slots"]) == set(dump.SLOTS)
    assert all(0 < share < 1 for share in kernel["slots"].values())
  if "xla" in forms:
    forward, backward = made["xla"]["F"], made["xla"]["G"]
    assert 10 < forward["operations"] < backward["operations"] < 1000
    assert forward["cycles"] < backward["cycles"]
    # Half of the launches at least have a schedule that was found.
    assert 200 < forward["bundles"] < backward["bundles"]
