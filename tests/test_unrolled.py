"""What a compiler counts of a loop once, counted as often as it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from conftest import config_dict, mmdit_dict
from flax import nnx

from contextdiff_jax.benchmarks.tpu import hlo, unrolled
from contextdiff_jax.models.joint import JointBlock
from contextdiff_jax.settings import parse


def test_a_loops_body_is_counted_as_often_as_it_runs_from_programs_written_out():
    """Costs are made up: 2 s a layer with a second attention, 1 s a layer without, 5 s the last,
    and 3 s for all else.
    """
    fields = {"model.num_layers": 12, "model.dual_attention_layers": (0, 1, 2, 3, 4)}
    settings = parse(mmdit_dict(**fields))
    tried = []

    def measure(candidate):
        tried.append([stack.count for stack in candidate.model.stacks()])
        assert candidate.train.unroll
        dual = len(candidate.model.dual_attention_layers)
        plain = candidate.model.num_layers - dual - 1
        return {"seconds": 3.0 + 2 * dual + plain + 5}

    whole, layers = unrolled.counted(settings, measure)
    assert tried == [[2, 2, 1], [4, 2, 1], [2, 4, 1]]
    assert whole == {"seconds": 3.0 + 2 * 5 + 6 + 5}
    assert [(layer.count, layer.figures["seconds"]) for layer in layers] == [(5, 2.0), (6, 1.0)]
    assert not unrolled.is_looped(parse(config_dict()))


def test_useful_operations_are_those_of_a_layers_products():
    config = parse(mmdit_dict()).model
    block = nnx.eval_shape(
        lambda: JointBlock(16, 2, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 64, 16), (1, 32, 16), (1, 16))]
    graph, params = nnx.split(block)
    step = jax.jit(lambda params, *x: nnx.merge(graph, params)(*x))
    counted = step.lower(params, *shapes).cost_analysis()["flops"]
    useful = unrolled.useful_flops(config, False, 64, 32) / 3
    assert useful < counted < 1.25 * useful  # the rest: norms, softmax, activations


def test_loops_count_as_often_as_they_run():
    program = hlo.instructions("""
%body (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %while.1 = f32[8]{0} while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}""")  # noqa: E501
    assert hlo.collectives(program, {"data": 2}) == [hlo.Traffic("all-reduce", "data", 7, 7 * 32.0)]


def test_a_loops_condition_tells_how_often_it_runs_where_nothing_else_does():
    program = hlo.instructions("""
%cond (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(23)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %add.2 = f32[8]{0} add(%a, %b), backend_config={"estimated_cycles":"100"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %while.1 = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body
}""")
    sent = hlo.Traffic("all-reduce", "data", 23, 23 * 32.0)
    assert hlo.collectives(program, {"data": 2}) == [sent]
    assert hlo.cycles(program) == 2300
