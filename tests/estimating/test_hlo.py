"""Cost of a program's text: trips, branches, collectives and what hides them, kernels."""

import pytest

from deepgen_jax.estimating.hlo import parse, program_cost, shape_bytes
from deepgen_jax.estimating.program import kernel_flops, out_of_memory

# A loop of 5 over a matrix product, an all-gather that starts early, a reduce-scatter that doesn't, a branch, a kernel.
TEXT = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %dot.1 = bf16[8,4]{1,0} fusion(%p), kind=kOutput, calls=%inner, backend_config={"estimated_cycles":"100"}
}

%bound (p: s32[]) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%p, %limit), direction=LT
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %p.1 = (s32[], bf16[8,4]) parameter(0)
  ROOT %less.1 = pred[] fusion(%p.1), kind=kLoop, calls=%bound
}

%dear (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %update = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"40"}
}

%cheap (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %p.2 = bf16[8,4]{1,0} parameter(0)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %gather = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %while.1 = (s32[], bf16[8,4]) while(%x), condition=%condition, body=%body
  %gathered = bf16[32,4]{1,0} all-gather-done(%gather)
  %scattered = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add
  %if.1 = bf16[8,4] conditional(%q, %x, %x), branch_computations={%cheap, %dear}
  %splash_fwd.1 = bf16[2,16,8] custom-call(%if.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/pallas_call"}
  ROOT %copy.1 = bf16[2,16,8]{2,1,0} copy(%splash_fwd.1), backend_config={"estimated_cycles":"10"}
}
"""


def test_shapes_and_instructions():
  assert shape_bytes("(s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}, /*index=5*/pred[3])") == 4 + 64 + 3
  computations, entry = parse(TEXT)
  assert entry == "main" and [i.opcode for i in computations["main"]][1:3] == ["all-gather-start", "while"]


def test_loops_count_their_trips_and_a_conditional_its_dearest_branch():
  cost = program_cost(TEXT, bytes_per_cycle=1.0)
  assert (cost.cycles, cost.once, cost.branch, cost.unknown_trips) == (550, 150, 40, 0)
  assert program_cost(TEXT.replace("constant(5)", "parameter(1)"), 1.0).unknown_trips == 1
  assert program_cost(TEXT.replace('cycles":"100"', f'cycles":"{2**63 - 1}"'), 1.0).cycles == 50  # none


@pytest.mark.parametrize("speed, exposed", [(1.0, 96), (0.1, 96 + 192 - 50), (1e9, 96)])
def test_a_collective_hides_behind_what_runs_before_its_end(speed, exposed):
  """The gather takes in 3/4 of 256 bytes and has the loop's 500 cycles; the scatter, 3/4 of 4 x 32 bytes, has nothing."""
  cost = program_cost(TEXT, speed)
  assert cost.collectives == {"all-gather": 192, "reduce-scatter": 96}
  assert cost.exposed == pytest.approx(exposed)


FUSED = """\
HloModule jit_g, is_scheduled=true

%begin (x: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  ROOT %gather.1 = bf16[32,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%beside (x: bf16[8,4]) -> bf16[8,4] {
  ROOT %gather.2 = bf16[32,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.clone (x: f32[8,4]) -> f32[2,4] {
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=8, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
  ROOT %cut = f32[2,4]{1,0} dynamic-slice(%sum)
}

ENTRY %main (x: bf16[8,4]) -> f32[2,4] {
  %async-collective-start = (bf16[8,4], bf16[32,4]) fusion(%x), kind=kCustom, calls=%begin
  %fusion.1 = bf16[8,4]{1,0} fusion(%x), kind=kOutput, calls=%beside, backend_config={"estimated_cycles":"100"}
  %async-collective-done = bf16[32,4]{1,0} fusion(%fusion.1), kind=kCustom, calls=%begin
  ROOT %fusion.2 = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone
}
"""


@pytest.mark.parametrize("speed, exposed", [(1e9, 96), (0.5, 96 + 192 - 50)])
def test_collectives_inside_fusions_count_once(speed, exposed):
  """The gather goes on beside a product of 100 cycles; an all-reduce that is cut takes in 3/4 of 128 bytes."""
  cost = program_cost(FUSED, speed)
  assert cost.collectives == {"all-gather": 192, "reduce-scatter": 96}
  assert cost.exposed == pytest.approx(exposed)


def test_kernels_are_reported_with_their_shapes():
  runs, name, shapes = program_cost(TEXT, 1.0).kernels[0]
  assert (runs, name, shapes) == (1.0, "splash_fwd.1", [(8, 4), (2, 16, 8)])
  q, k = (2, 24, 64, 128), (2, 24, 64, 256)
  forward = 4 * 2 * 24 * 128 * 256 * 64
  assert kernel_flops("splash_fwd", [(1, 5, 5), q, k, k]) == forward
  assert kernel_flops("splash_dkv", [q, k, k]) == 2.5 * forward


def test_what_the_compiler_says_about_memory():
  temporary = out_of_memory("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.50T) exceeds HBM (95.73G).")
  assert temporary.needed == 1.5 * 2**40 and not temporary.whole
  whole = out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 109.2G of 95.74G hbm.")
  assert whole.needed == pytest.approx(109.2 * 2**30) and whole.whole
  assert out_of_memory("INTERNAL: a bug") is None
