"""Estimates by bundles: schedules as the compiler writes them, and parts."""

import json

import numpy as np
import pytest

from experiments.compile import __main__ as compile
from experiments.compile import plot
from nl_jax.aot import bundles, chips, estimate, hlo
from nl_jax.kernels import splash_attention

# Shortened: a loop of 10 turns, in 8 of which its pipeline is full; there a
# kernel's step has a part that a condition leaves out, with a loop of 5 turns
# within. Empty bundles have no mark of the loop.
SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %p1_p0 = scmp.ge.s32.totalorder %s9_s1, 1  ;;  %p2_p1 = scmp.lt.s32.totalorder %s9_s1, 9 } /* Start region 2 */
   0x2   : > { %p3_p2 = pnand %p2_p1, %p1_p0 }
   0x3   : > { %11 = sbr.rel (%p3_p2) target = $region7 }
   0x4   :  {}
   0x5   : > { %v1_v0 = vadd.f32 %v0_v0, %v0_v0 }
   0x6   : > { %p4_p3 = scmp.ne.s32.totalorder %s8_s2, 0 }
   0x7   : > { %12 = sbr.rel (%p4_p3) target = $region6 }
   0x8 LB: >> { %v2_v0 = vadd.f32 %v0_v0, %v0_v0 }
   0x9   : >> { %p5_p4 = scmp.ge.s32.totalorder %s7_s3, 5 /* loop exit test */ }
   0xa   : > { %13 = sbr.rel (!%p5_p4) target = $region5 } /* End region 5 */
   0xb PF: > { %v3_v0 = vadd.f32 %v0_v0, %v0_v0 } /* Start region 6 :: End region 6 */
   0xc PF: > { %s6_s1 = sadd.s32 1, %s9_s1 } /* Start/End empty region 7 */
   0xd   : > { %p6_p5 = scmp.ge.s32.totalorder %s6_s1, 10 /* loop exit test */ }
   0xe   :  { %7 = sbr.rel (!%p6_p5) target = $region2 }
   0xf   :  {}
"""  # noqa: E501


def test_bundles_count_by_the_turns_of_their_loops():
  got = bundles.schedule(SCHEDULE)
  # Around the pipeline 5 bundles of 10 turns; in it, of 8 turns, 6 and a loop
  # of two; outside of all 3.
  assert got.bundles == 3 + 5 * 10 + 8 * (6 + 2 * 5)
  # What a step may leave out: a loop within it once.
  assert got.maybe == 8 * 3
  assert got.always == 3 + 5 * 10 + 8 * 5
  assert not got.open


def test_a_loop_without_a_number_counts_once():
  got = bundles.schedule(SCHEDULE.replace("%s6_s1, 10", "%s6_s1, %n"))
  assert got.open == 1 and got.bundles < 40


@pytest.mark.parametrize("tokens,window,share", [
  (4096, 0, 36 / 64), (512, 0, 1.0), (1024, 512, 3 / 4), (4096, 1024, 21 / 64),
  (100, 0, 1.0),
])  # fmt: skip
def test_the_blocks_that_a_mask_leaves(tokens, window, share):
  assert splash_attention.share(tokens, window) == share


PROGRAM = """HloModule jit_step

%inside (a: f32[8,128], b: f32[128,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[128,128]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="one"}
}

%again (c: f32[8,128], d: f32[128,128]) -> f32[8,128] {
  %c = f32[8,128]{1,0} parameter(0)
  %d = f32[128,128]{1,0} parameter(1)
  ROOT %dot.2 = f32[8,128]{1,0} dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="two"}
}

ENTRY %main (x: f32[8,128], w: f32[128,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %w = f32[128,128]{1,0} parameter(1)
  %fusion.1 = f32[8,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%inside, metadata={op_name="jit(step)/jvp()/CMS/high/dot_general"}
  %fusion.2 = f32[8,128]{1,0} fusion(%fusion.1, %w), kind=kOutput, calls=%again, metadata={op_name="jit(step)/mixer/dot_general"}
  %copy.1 = f32[8,128]{0,1} copy(%fusion.2)
  %walk_fwd.1 = f32[8,128]{1,0} custom-call(%copy.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/mixer/pallas_call"}
  ROOT %splash_mha.1 = f32[8,128]{1,0} custom-call(%walk_fwd.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/mixer/pallas_call"}
}
"""  # noqa: E501


def test_a_program_is_told_by_parts():
  made = bundles.Schedule
  schedules = {
    "fusion.1": made(100_000.0, 100_000.0, 0.0, 0),
    "copy.1": made(1_320.0, 1_320.0, 0.0, 0),
    "walk_fwd.1": made(9e9, 14_000.0, 850.0, 0),
    "splash_mha.1": made(9e9, 1_000.0, 16_000.0, 0),
  }
  counts = hlo.count(PROGRAM, {}, schedules)
  first, second, *_ = counts.operations
  # Of two that are the same the compiler writes one.
  assert second.schedule == first.schedule
  assert first.flops == 2 * 8 * 128 * 128
  chip = chips.CHIPS["v5e"]
  got = estimate.estimate(counts, chip, 1, tokens=4096)
  cycles = {
    "CMS": 100_180, "projections": 100_180, "walks": 15_030,
    "attention": 1_180 + 16_000 * 36 / 64, "copies": 1_500,
  }  # fmt: skip
  assert list(got.parts)[:2] == ["CMS", "projections"]
  for name, value in cycles.items():
    np.testing.assert_allclose(got.parts[name], value / chip.clock)
  np.testing.assert_allclose(got.seconds, sum(cycles.values()) / chip.clock)
  assert (got.launches, got.unknown) == (5, 0)
  text = compile.schedule(got._asdict() | dict(seconds=got.seconds))
  assert "5 launches" in text and "| CMS | 0.1 | 44% |" in text
  # Products and main memory are never faster than the chip.
  slow = chip._replace(flops=1e6)
  slower = estimate.estimate(counts, slow, 1, tokens=4096)
  np.testing.assert_allclose(slower.parts["CMS"], first.flops / 1e6)


def test_without_a_clock_there_is_no_time():
  counts = hlo.count(PROGRAM, {})
  chip = chips.CHIPS["v4"]
  assert estimate.estimate(counts, chip, 1, tokens=4096) is None


def test_reports_are_drawn_over_the_length_of_rows(tmp_path):
  def report(config: str, length: int, seconds: float) -> str:
    train = dict(program="train", schedule=dict(seconds=seconds))
    made = dict(batch=[2**19 // length, length], programs=[train])
    path = tmp_path / f"{config}{length}.json"
    path.write_text(json.dumps(dict(about=dict(config=config), reports=[made])))
    return str(path)

  paths = [report(c, n, s) for c, n, s in (
    ("transformer_1b3", 4096, 0.2), ("transformer_1b3", 32768, 0.3),
    ("hope_1b3", 4096, 0.3),
  )]  # fmt: skip
  points = plot.read(paths)
  assert points["transformer_1b3"] == {4096: 0.2, 32768: 0.3}
  picture = tmp_path / "steps.png"
  plot.draw(points, "steps", picture)
  assert picture.read_bytes().startswith(b"\x89PNG")
  (tmp_path / "other.json").write_text("{}")
  with pytest.raises(ValueError, match="other.json is not a report of a train"):
    plot.read([str(tmp_path / "other.json")])
