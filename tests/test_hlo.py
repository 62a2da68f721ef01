"""What is read from compiled programs, on small ones whose numbers are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from muse_jax import compile, hlo, roofline, specs, traffic

LOOP = """HloModule m, is_scheduled=true

%fused (p0: f32[6,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[6,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %kernel = f32[4,8]{1,0} bitcast(%slice)
}

%body (b: (s32[], f32[2,4], f32[6,4,8])) -> (s32[], f32[2,4], f32[6,4,8]) {
  %b = (s32[], f32[2,4]{1,0}, /*index=2*/f32[6,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[2,4]{1,0} get-tuple-element(%b), index=1
  %w = f32[6,4,8]{2,1,0} get-tuple-element(%b), index=2
  %k = f32[4,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %dot = f32[2,8]{1,0} dot(%x, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather-start = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%dot), replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = f32[8,8]{1,0} all-gather-done(%gather-start)
  %sum = f32[2,4]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[2,4]{1,0}, f32[6,4,8]{2,1,0}) tuple(%i, %sum, %w)
}

%condition (c: (s32[], f32[2,4], f32[6,4,8])) -> pred[] {
  %c = (s32[], f32[2,4]{1,0}, f32[6,4,8]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%n, %six), direction=LT
}

ENTRY %main (a: (s32[], f32[2,4], f32[6,4,8])) -> (s32[], f32[2,4], f32[6,4,8]) {
  %a = (s32[], f32[2,4]{1,0}, f32[6,4,8]{2,1,0}) parameter(0)
  ROOT %while = (s32[], f32[2,4]{1,0}, f32[6,4,8]{2,1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    module = hlo.parse(LOOP)
    loop = module.computations["main"].instructions["while"]
    assert hlo.trip_count(module, loop) == 6
    assert hlo.flops(module) == 6 * 2 * 2 * 8 * 4
    known = hlo.parse(LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'))
    assert hlo.flops(known) == 9 * 2 * 2 * 8 * 4
    unknown = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert hlo.unknown_loops(unknown) == ["while"]
    assert not hlo.unknown_loops(module)


def test_collectives_with_the_bytes_that_a_chip_receives():
    found = traffic.collectives(hlo.parse(LOOP))
    assert found == {
        "all-gather": {"count": 6, "bytes": 6 * 8 * 8 * 4 * 3 / 4},
        "all-reduce": {"count": 6, "bytes": 6 * 2 * 4 * 4 * 2 * 1 / 2},
    }


def test_several_arrays_may_be_gathered_at_once():
    one = "(f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%dot)"
    two = "((f32[2,8]{1,0}, f32[2,4]{1,0}), (f32[8,8]{1,0}, f32[8,4]{1,0})) all-gather-start(%dot, %x)"
    found = traffic.collectives(hlo.parse(LOOP.replace(one, two)))
    assert found["all-gather"] == {"count": 6, "bytes": 6 * 8 * (8 + 4) * 4 * 3 / 4}


def test_bytes_of_a_sliced_operand_are_those_of_the_slice():
    module = hlo.parse(LOOP)
    body = module.computations["body"]
    assert traffic.own_bytes(module, body, body.instructions["k"]) == 4 * (4 * 8) + 4 + 4 * (4 * 8)
    assert traffic.own_bytes(module, body, body.instructions["dot"]) == 4 * (2 * 4 + 4 * 8 + 2 * 8)
    per_layer = sum(traffic.own_bytes(module, body, i) for i in body.instructions.values())
    assert traffic.total_bytes(module) == 6 * per_layer


def test_a_slice_in_a_fusion_in_a_fusion_is_seen():
    outer = """%outer (q0: f32[6,4,8], q1: s32[], q2: f32[2,4]) -> f32[2,8] {
  %q0 = f32[6,4,8]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[2,4]{1,0} parameter(2)
  %inner = f32[4,8]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%fused
  ROOT %product = f32[2,8]{1,0} dot(%q2, %inner), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body"""
    text = LOOP.replace("%body", outer, 1)
    line = next(line for line in text.splitlines() if "%dot =" in line)
    module = hlo.parse(text.replace(line, "  %dot = f32[2,8]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%outer"))
    body = module.computations["body"]
    assert traffic.own_bytes(module, body, body.instructions["dot"]) == 4 * (4 * 8 + 1 + 2 * 4 + 2 * 8)
    assert hlo.flops(module) == 6 * 2 * 2 * 8 * 4


def test_arrays_in_on_chip_memory_cost_no_main_memory():
    fast = hlo.parse(LOOP.replace("%dot = f32[2,8]{1,0}", "%dot = f32[2,8]{1,0:T(8,128)S(1)}"))
    body = fast.computations["body"]
    assert traffic.own_bytes(fast, body, body.instructions["dot"]) == 4 * (2 * 4 + 4 * 8)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={{0,3,6},{1,4,7}}", (0, 3, 6)),
        ("source_target_pairs={{0,5},{5,0}}", (0, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, channel_id=1", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}, channel_id=1", (0, 2)),
        ("replica_groups={}, channel_id=1", ()),
    ],
)
def test_groups(text, group):
    assert traffic._group(text) == group


def test_a_product_written_as_a_convolution_counts_what_meets():
    """A batched product on TPU: the dilated window leaves one place of the batch for each output."""
    line = (
        "ENTRY %main (a: bf16[5,6,7], b: bf16[5,7,9]) -> f32[5,6,9] {\n"
        "  %a = bf16[5,6,7]{2,1,0} parameter(0)\n  %b = bf16[5,7,9]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[5,6,9]{2,1,0} convolution(%a, %b), window={size=5 stride=4 lhs_dilate=5}, "
        "dim_labels=0bf_0io->0bf\n}\n"
    )
    assert hlo.flops(hlo.parse(line)) == 2 * 5 * 6 * 7 * 9


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing")


def compiled(function, *args, **settings) -> hlo.Module:
    return hlo.parse(jax.jit(function, **settings).lower(*args).compile().as_text())


def test_scanned_products_of_a_real_program():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0]

    module = compiled(layers, jnp.zeros((16, 32)), jnp.zeros((5, 32, 32)))
    assert hlo.flops(module) == 5 * 2 * 16 * 32 * 32
    assert not hlo.unknown_loops(module)


def test_convolutions_of_a_real_program():
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    module = compiled(convolution, jnp.zeros((2, 9, 9, 3)), jnp.zeros((3, 3, 3, 8)))
    assert hlo.flops(module) == 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3)


def test_collectives_of_a_real_program():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=split)
    module = compiled(lambda x: x.sum(axis=0), x, out_shardings=whole)
    assert traffic.collectives(module) == {"all-reduce": {"count": 1, "bytes": 16 * 4 * 2 * 7 / 8}}


# ------------------------------------------------------------------------------------- roofline


def test_the_largest_slice_of_v5p_is_a_part_of_its_pod():
    with pytest.raises(specs.SpecError, match="the largest slice of this chip has 6144 chips"):
        compile.topology_devices("v5p:16x20x28")


def test_a_collective_hides_behind_what_is_scheduled_before_its_end():
    chip = roofline.Chip(flops=1.0, memory_bytes=0, memory_rate=1e30, link_rate=1.0, torus=3, largest=4096)
    times = roofline.estimate(hlo.parse(LOOP), chip)
    gather, reduce, dot = 8 * 8 * 4 * 3 / 4, 2 * 4 * 4.0, 2 * 2 * 8 * 4.0
    assert times.compute == 6 * dot
    assert times.interconnect == 6 * (gather + reduce)
    assert times.step == pytest.approx(6 * (dot + gather + reduce))
    moved = LOOP.replace("all-gather-start(%dot)", "all-gather-start(%x)").splitlines()
    start = next(i for i, line in enumerate(moved) if "all-gather-start(" in line)
    dot_line = next(i for i, line in enumerate(moved) if "%dot =" in line)
    moved.insert(dot_line, moved.pop(start))
    hidden = roofline.estimate(hlo.parse("\n".join(moved)), chip)
    assert hidden.step == pytest.approx(6 * (max(dot, gather) + reduce))
    assert hidden.exposed == pytest.approx(6 * (max(0, gather - dot) + reduce))


def test_a_group_has_the_links_of_the_axes_that_it_spans():
    chip = roofline.Chip(flops=1e30, memory_bytes=0, memory_rate=1e30, link_rate=3.0, torus=3, largest=4096)
    line = [(i, 0, 0) for i in range(8)]
    cube = [(i // 4, i // 2 % 2, i % 2) for i in range(8)]
    one, two = (roofline.estimate(hlo.parse(LOOP), chip, places).interconnect for places in (line, cube))
    gather, reduce = 6 * 8 * 8 * 4 * 3 / 4, 6 * 2 * 4 * 4
    assert one == pytest.approx(gather / 1 + reduce / 1)
    assert two == pytest.approx(gather / 2 + reduce / 1)


# A gather that libtpu spreads over three fusions: it starts, a product goes on meanwhile, it ends.
SPREAD = """HloModule spread, num_partitions=4

%start (p0: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %p0 = f32[2,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,8]{1,0} all-gather(%p0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begin = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%product (q0: f32[2,8], q1: f32[8,8], q2: f32[4,8], q3: f32[8,6]) -> (f32[4,6], f32[2,8], f32[8,8], f32[8,8]) {
  %q2 = f32[4,8]{1,0} parameter(2)
  %q3 = f32[8,6]{1,0} parameter(3)
  %dot = f32[4,6]{1,0} dot(%q2, %q3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %q0 = f32[2,8]{1,0} parameter(0)
  %q1 = f32[8,8]{1,0} parameter(1)
  %all-gather.2 = f32[8,8]{1,0} all-gather(%q0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %all = (f32[4,6]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%dot, %q0, %q1, %all-gather.2)
}

%end (r0: f32[2,8], r1: f32[8,8], r2: u32[]) -> f32[8,8] {
  %r0 = f32[2,8]{1,0} parameter(0)
  %r1 = f32[8,8]{1,0} parameter(1)
  %r2 = u32[]{:S(2)} parameter(2)
  %all-gather.3 = f32[8,8]{1,0} all-gather(%r0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %wait = f32[8,8]{1,0} custom-call(%r0, %r1, %all-gather.3, %r2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[2,8], y: f32[4,8], z: f32[8,6]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} parameter(1)
  %z = f32[8,6]{1,0} parameter(2)
  %f1 = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %g0 = f32[2,8]{1,0} get-tuple-element(%f1), index=0
  %g1 = f32[8,8]{1,0} get-tuple-element(%f1), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%f1), index=2
  %f2 = (f32[4,6]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}) fusion(%g0, %g1, %y, %z), kind=kOutput, calls=%product
  %h0 = f32[2,8]{1,0} get-tuple-element(%f2), index=1
  %h1 = f32[8,8]{1,0} get-tuple-element(%f2), index=2
  ROOT %f3 = f32[8,8]{1,0} fusion(%h0, %h1, %g2), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_an_exchange_that_is_spread_over_fusions_counts_once():
    module = hlo.parse(SPREAD)
    gathered = 8 * 8 * 4 * 3 / 4
    assert traffic.collectives(module) == {"all-gather": {"count": 1, "bytes": gathered}}
    main = module.computations["main"]
    # The product reads and writes its own; the buffers that pass by are the start's, which the end doesn't copy.
    own = {name: traffic.own_bytes(module, main, main.instructions[name]) for name in ("f2", "f3")}
    assert own == {"f2": 4 * (4 * 8 + 8 * 6 + 4 * 6), "f3": 0.0}
    chip = roofline.Chip(flops=1.0, memory_bytes=0, memory_rate=1e30, link_rate=0.1, torus=3, largest=4096)
    slow = roofline.estimate(module, chip)
    product = 2 * 4 * 6 * 8.0
    assert slow.step == pytest.approx(gathered / 0.1)
    assert slow.exposed == pytest.approx(gathered / 0.1 - product)
    quick = roofline.estimate(module, roofline.Chip(1.0, 0, 1e30, 10.0, 3, 4096))
    assert (quick.step, quick.exposed) == (pytest.approx(product), 0.0)


def test_an_all_reduce_of_which_each_keeps_a_part_is_a_reduce_scatter():
    """As libtpu writes it."""
    text = """HloModule scatter, num_partitions=4

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %all-reduce.7 = bf16[64,8]{1,0} all-reduce(%p), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.7, %id, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: bf16[64,8]) -> bf16[16,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  ROOT %f = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = traffic.collectives(hlo.parse(text))
    assert found == {"reduce-scatter": {"count": 1, "bytes": 64 * 8 * 2 * 3 / 4}}


def test_a_reduce_scatter_that_shares_anothers_channel_counts_too():
    """libtpu gives all exchanges that it leaves synchronous one channel, which one that it spreads may have."""
    scatter = """
%all-reduce-scatter.1 (p: f32[8,8]) -> f32[2,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %all-reduce.7 = f32[8,8]{1,0} all-reduce(%p), channel_id=5, replica_groups=[1,4]<=[4], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%all-reduce.7, %id, %zero), dynamic_slice_sizes={2,8}
}

ENTRY"""
    text = SPREAD.replace("\nENTRY", scatter, 1).replace("ROOT %f3", "%f3")
    last = "  ROOT %f4 = f32[2,8]{1,0} fusion(%f3), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    found = traffic.collectives(hlo.parse(text.rstrip().removesuffix("}") + last))
    moved = 8 * 8 * 4 * 3 / 4
    assert found == {"all-gather": {"count": 1, "bytes": moved}, "reduce-scatter": {"count": 1, "bytes": moved}}
