"""Loops and communication are read from the text of a compiled program."""

import pytest

from benchmarks.hlo import analyze_schedule

PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} fusion(%state), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %wide = bf16[8,512]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %next = (s32[], f32[8,128]{1,0}) tuple(%state, %x)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%state.1, %limit), direction=LT
}

ENTRY %main (x: f32[8,128]) -> f32[16] {
  %start = (s32[], f32[8,128]{1,0}) parameter(0)
  %loop = (s32[], f32[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %y = f32[16]{0} fusion(%loop), kind=kLoop, backend_config={"estimated_cycles":"20"}
  %sent = (f32[16]{0}, f32[16]{0}) collective-permute-start(%y), channel_id=2
  ROOT %total = f32[16]{0} all-reduce(%y), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_loop_counts_every_run():
    schedule = analyze_schedule(PROGRAM)
    assert schedule.cycles == 5 * 100 + 20
    once = analyze_schedule(PROGRAM.replace("constant(5)", "constant(1)"))
    twice = analyze_schedule(PROGRAM.replace("constant(5)", "constant(2)"))
    assert schedule.memory_bytes - once.memory_bytes == pytest.approx(
        4 * (twice.memory_bytes - once.memory_bytes)
    )


def test_unknown_estimate_is_ignored():
    text = PROGRAM.replace('"estimated_cycles":"20"', f'"estimated_cycles":"{2**63 - 1}"')
    assert analyze_schedule(text).cycles == 5 * 100


def test_bytes_are_those_that_a_device_receives():
    schedule = analyze_schedule(PROGRAM)
    gathered = 5 * (8 * 512 * 2) * 3 / 4
    summed = 2 * (16 * 4) * 3 / 4
    assert schedule.blocking_bytes == gathered + summed
    assert schedule.overlapped_bytes == 16 * 4


def test_gather_that_overlaps_a_loop_is_received_once():
    def part(name):
        gather = "all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}"
        return (
            f"%{name} (p: f32[16]) -> f32[64] {{\n"
            f"  %p = f32[16]{{0}} parameter(0)\n  ROOT %{name}.out = f32[64]{{0}} {gather}\n}}\n"
        )

    names = ("fused_begin", "async_collective_fusion.1", "async_collective_fusion.2", "fused_end")
    calls = [f"  %{name}.in = f32[64]{{0}} fusion(%p), calls=%{name}\n" for name in names]
    begin, *steps, end = calls
    text = PROGRAM.replace("%body (", "".join(map(part, names)) + "\n%body (", 1)
    text = text.replace("  %wide", "".join(steps) + "  %wide", 1)
    text = text.replace("  %loop", begin + "  %loop", 1).replace("  %sent", end + "  %sent", 1)
    schedule, without = analyze_schedule(text), analyze_schedule(PROGRAM)
    assert schedule.blocking_bytes == without.blocking_bytes
    assert schedule.overlapped_bytes - without.overlapped_bytes == 64 * 4 * 3 / 4


@pytest.mark.parametrize("order", ["", ", device_ids=([4,2]T(1,0))"])
def test_device_groups_may_be_axes_of_a_mesh(order):
    groups = f"replica_groups=mesh['data'=4,'model'=2]{order} {{'data'}}"
    text = PROGRAM.replace("replica_groups=[2,4]<=[8]", groups)
    assert analyze_schedule(text) == analyze_schedule(PROGRAM)


def test_loop_without_a_constant_trip_count_is_refused():
    with pytest.raises(ValueError, match="0 constants"):
        analyze_schedule(PROGRAM.replace("constant(5)", "parameter(1)"))


FUSIONS = """
%row (table: f32[32,128], index: s32[]) -> f32[1,128] {
  %table = f32[32,128]{1,0} parameter(0)
  %index = s32[] parameter(1)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%table, %index, %index), dynamic_slice_sizes={1,128}
}

%store (table: f32[32,128], row: f32[1,128], index: s32[]) -> f32[32,128] {
  %table = f32[32,128]{1,0} parameter(0)
  %row.1 = f32[1,128]{1,0} parameter(1)
  %index = s32[] parameter(2)
  ROOT %new = f32[32,128]{1,0} dynamic-update-slice(%table, %row.1, %index, %index)
}

%double (x: f32[32,128]) -> f32[32,128] {
  %x = f32[32,128]{1,0} parameter(0)
  ROOT %sum = f32[32,128]{1,0} add(%x, %x)
}

ENTRY %main (table: f32[32,128], index: s32[]) -> f32[32,128] {
  %table = f32[32,128]{1,0:T(8,128)} parameter(0)
  %index = s32[]{:S(6)} parameter(1)
  INSTRUCTION
}
"""
ROW, TABLE = 128 * 4, 32 * 128 * 4


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("%y = f32[32,128]{1,0:T(8,128)} fusion(%table), calls=%double", 2 * TABLE),
        ("%y = f32[32,128]{1,0:T(8,128)S(1)} fusion(%table), calls=%double", TABLE),
        ("%y = f32[1,128]{1,0} fusion(%table, %index), calls=%row", 2 * ROW),
        ("%y = f32[1,128]{1,0:S(1)} dynamic-slice(%table, %index, %index)", ROW),
        ("%y = f32[32,128]{1,0} fusion(%table, %y.1, %index), calls=%store", 2 * ROW),
        ("%y = (f32[32,128]{1,0:S(1)}, f32[32,128]{1,0}, u32[]{:S(2)}) copy-start(%table)", TABLE),
        ("%y = f32[32,128]{1,0:S(1)} copy-done(%table)", 0),
    ],
    ids=["fusion", "on_chip", "part", "slice", "in_place", "prefetch", "prefetched"],
)
def test_memory_is_what_passes_between_chip_and_device_memory(instruction, expected):
    if "%y.1" in instruction:
        instruction = f"%y.1 = f32[1,128]{{1,0}} parameter(2)\n  {instruction}"
    text = FUSIONS.replace("INSTRUCTION", instruction)
    assert analyze_schedule(text).memory_bytes == expected
