"""A program's text, read: loops count as often as they run, transfers in their dtype."""

from jaxlora.planning.hlo import BETWEEN_SLICES, Module

# The forms that the compilers for TPU, GPU and CPU write.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%gather (p.0: s4[1,64,32]) -> (s4[1,64,128]) {
  %p.0 = s4[1,64,32]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)
  ROOT %all-gather.1 = s4[1,64,128]{2,1,0:T(64,128)(8,1)E(4)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}
}

%gather.copy (p.1: s4[1,64,32]) -> (s4[1,64,128]) {
  %p.1 = s4[1,64,32]{2,1,0} parameter(0)
  ROOT %all-gather.2 = s4[1,64,128]{2,1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}
}

%stack (p.2: bf16[6,8,16], p.3: bf16[1,8,16], p.4: s32[]) -> bf16[6,8,16] {
  ROOT %dynamic-update-slice.1 = bf16[6,8,16]{2,1,0} dynamic-update-slice(%p.2, %p.3, %p.4), \
metadata={op_name="jit(step)/while/body/jvp()/while"}
}

%stack.back (p.5: f32[6,8,4], p.6: f32[1,8,4], p.7: s32[]) -> f32[6,8,4] {
  ROOT %dynamic-update-slice.2 = f32[6,8,4]{2,1,0} dynamic-update-slice(%p.5, %p.6, %p.7), \
metadata={op_name="jit(step)/while/body/transpose(jvp())/while"}
}

%body (arg: (s32[], bf16[6,8,16])) -> (s32[], bf16[6,8,16]) {
  %call.1 = (s4[1,64,128]) fusion(%x), kind=kCustom, calls=%gather
  %call.2 = (s4[1,64,128]) fusion(%x), kind=kCustom, calls=%gather.copy
  %fusion.1 = bf16[6,8,16]{2,1,0} fusion(%a, %b, %i), kind=kLoop, calls=%stack
  %fusion.2 = f32[6,8,4]{2,1,0} fusion(%a, %b, %i), kind=kLoop, calls=%stack.back
  %send.1 = (f32[5,4]{1,0}, u32[], token[]) send(%g, %t), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send.2 = (f32[5,4]{1,0}, u32[], token[]) send(%g, %t), channel_id=5, is_host_transfer=true
  %all-to-all.1 = (f32[2,8]{1,0}, f32[2,8]{1,0}) all-to-all(%k.0, %k.1), channel_id=1, \
replica_groups={{0,1},{2,3}}
  %all-to-all.2 = (f32[2,8]{1,0}, f32[2,8]{1,0}) all-to-all(%v.0, %v.1), channel_id=1, \
replica_groups={{0,1},{2,3}}
  %all-reduce-start.1 = f32[100]{0} all-reduce-start(%g), channel_id=9, \
replica_groups=[2,2]<=[4], to_apply=%add
}

%condition (arg.1: (s32[], bf16[6,8,16])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(6)
  ROOT %compare.1 = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

%outer_body (arg.2: (s32[])) -> (s32[]) {
  %while.2 = (s32[], bf16[6,8,16]) while(%t), condition=%condition, body=%body
}

%outer_condition (arg.3: (s32[])) -> pred[] {
  ROOT %compare.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%t), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"3"}}
  %reduce-scatter.1 = bf16[10]{0} reduce-scatter(%g), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_collectives_count_loops_and_know_their_dtype():
    found = {(c.kind, c.array.dtype): c for c in Module(PROGRAM).collectives()}
    gather = found["all-gather", "s4"]
    # 3 times 6 layers; the copy of channel 7 is the same transfer.
    assert (gather.times, gather.array.shape) == (18, (1, 64, 128))
    assert gather.payload_bytes == 18 * 64 * 128 / 2
    assert gather.sent_bytes == gather.payload_bytes * 3 / 4
    reduce = found["all-reduce", "f32"]
    assert (reduce.times, reduce.payload_bytes) == (18, 18 * 400)
    assert reduce.sent_bytes == reduce.payload_bytes  # twice the half, between two
    exchange = found["all-to-all", "f32"]  # two of them, on the channel of all `shard_map`s
    assert (exchange.times, exchange.payload_bytes) == (36, 36 * 2 * 64)
    assert exchange.sent_bytes == exchange.payload_bytes / 2
    (slow,) = (c for c in found.values() if c.kind == BETWEEN_SLICES)
    assert (slow.times, slow.payload_bytes, slow.sent_bytes) == (18, 18 * 80, 18 * 80)
    scatter = found["reduce-scatter", "bf16"]
    assert (scatter.times, scatter.sent_bytes) == (1, 20 * 3)


def test_what_waits_for_the_backward_pass_is_what_the_forward_loop_stacks():
    assert Module(PROGRAM).saved_for_backward() == 6 * 8 * 16 * 2
    on_host = PROGRAM.replace("1 = bf16[6,8,16]{2,1,0} dyn", "1 = bf16[6,8,16]{2,1,0:S(5)} dyn")
    assert Module(on_host).saved_for_backward() == 0, "nothing of it waits on the device"


def test_a_program_without_text_has_nothing():
    assert Module("").collectives() == []
