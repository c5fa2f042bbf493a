"""FLOPs, bytes and seconds of compiled programs, loops included."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from engram_jax.analysis import estimates
from engram_jax.analysis.compiled import cost
from engram_jax.analysis.costs import flops_per_token
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import AttentionConfig, ModelConfig
from tests.libtpu import needs_libtpu


def costs(f, *arguments):
  """Ours, and XLA's own, of `f` compiled for this machine."""
  compiled = jax.jit(f).lower(*arguments).compile()
  return cost(compiled), compiled.cost_analysis()


def ones(*shape):
  return jnp.ones(shape)


N = 64
PRODUCT = 2 * N**3


def scanned(x, weights):
  """Per weight three products in an inner loop, and one in a branch."""

  def outer(x, w):
    x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)
    return lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x), None

  return jnp.sum(lax.scan(outer, x, weights)[0])


def test_loops_count_as_often_as_they_turn():
  x, weights = ones(N, N), ones(7, N, N)
  ours, xla = costs(scanned, x, weights)
  assert ours["flops"] == 7 * 4 * PRODUCT
  assert ours["conditionals"] == 1
  assert xla["flops"] < 5 * PRODUCT  # once each: why this file exists
  # A product's gradient is two products.
  ours, _ = costs(jax.grad(scanned, argnums=(0, 1)), x, weights)
  assert ours["flops"] == 3 * 7 * 4 * PRODUCT


def test_a_loop_equals_its_unrolled_program():
  def chain(unroll):
    def f(x, weights):
      step = lambda x, w: (jnp.tanh(x @ w), None)
      return lax.scan(step, x, weights, unroll=unroll)[0]

    return costs(f, ones(N, N), ones(8, N, N))[0]

  rolled, unrolled = chain(1), chain(8)
  assert rolled["flops"] == unrolled["flops"] == 8 * PRODUCT
  # The loop copies a weight out of the stack; it does not read the stack.
  assert 1 <= rolled["bytes_accessed"] / unrolled["bytes_accessed"] < 2.5


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_costs_what_its_formula_says(scan):
  attention = AttentionConfig(
    num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=16
  )
  config = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=5,
    attention=attention,
    dense_size=64,
    num_dense_layers=5,
    scan_blocks=scan,
  )
  batch, length = 2, 24
  graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
  ours, _ = costs(
    lambda state, ids: nnx.merge(graph, state)(ids, None).logits,
    state,
    jnp.zeros((batch, length), jnp.int32),
  )
  formula = flops_per_token(config, length)
  # Short sequences are compared with all of themselves, then masked.
  masked = formula["attention_scores"] * (2 * length / (length + 1) - 1)
  expected = batch * length * (formula["forward"] + masked)
  assert ours["flops"] == pytest.approx(expected, rel=0.01)
  assert ours["unknown_loops"] == 0


CONVOLUTION = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
  "f, arguments",
  [
    (lambda x, y: x @ y, (ones(5, 16), ones(16, 7))),
    (
      lambda x, y: jnp.einsum("bij,bjk->bik", x, y),
      (ones(5, 8, 6), ones(5, 6, 4)),
    ),
    (
      lambda x, y: lax.conv_general_dilated(
        x, y, (2, 1), "SAME", feature_group_count=2,
        dimension_numbers=CONVOLUTION,
      ),
      (ones(3, 9, 8, 4), ones(3, 3, 2, 6)),
    ),
    (
      lambda x, y: lax.conv_general_dilated(
        x, y, (1, 1), ((2, 0), (1, 3)), lhs_dilation=(2, 1),
        rhs_dilation=(1, 2), dimension_numbers=CONVOLUTION,
      ),
      (ones(2, 6, 8, 3), ones(3, 2, 3, 5)),
    ),
  ],
)  # fmt: skip
def test_products_count_as_xla_counts_them(f, arguments):
  ours, xla = costs(f, *arguments)
  assert ours["flops"] == xla["flops"] > 0


def test_a_batched_product_as_a_tpu_writes_it():
  # 5 products [8, 6] x [6, 4]: the batch is a dilated window, one place of the
  # kernel meeting one of the input.
  text = (
    "ENTRY %main (x: f32[5,8,6], y: f32[5,6,4]) -> f32[5,8,4] {\n"
    "  %x = f32[5,8,6]{2,1,0} parameter(0)\n"
    "  %y = f32[5,6,4]{2,1,0} parameter(1)\n"
    "  ROOT %c = f32[5,8,4]{2,1,0} convolution(%x, %y), window={size=5 "
    "stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf\n}\n"
  )
  (found,) = estimates.work(text).operations
  assert found.flops == 2 * 5 * 8 * 6 * 4


def fusion(result, inside):
  """A fusion of a table of 400 bytes, an index and 40 bytes of rows."""
  return (
    f"%inside (t: f32[100], i: s32[], r: f32[10]) -> {result} {{\n"
    "  %t = f32[100] parameter(0)\n"
    "  %i = s32[] parameter(1)\n"
    f"  %r = f32[10] parameter(2)\n  ROOT %o = {result} {inside}\n}}\n"
    f"ENTRY %main (t: f32[100], i: s32[], r: f32[10]) -> {result} {{\n"
    "  %t.1 = f32[100] parameter(0)\n"
    "  %i.1 = s32[] parameter(1)\n"
    "  %r.1 = f32[10] parameter(2)\n"
    f"  ROOT %f = {result} fusion(%t.1, %i.1, %r.1), kind=kLoop, calls=%inside"
    ', metadata={op_name="jit(f)/a(b)"}, backend_config={"window_config":'
    '{"estimated_cycles":"12"}}\n}\n'
  )


@pytest.mark.parametrize(
  "result, inside, size",
  [
    ("f32[10]", "dynamic-slice(%t, %i), dynamic_slice_sizes={10}", 40 + 4 + 40),
    ("f32[100]", "dynamic-update-slice(%t, %r, %i)", 40 + 4 + 40),
    ("f32[100]", "negate(%t)", 400 + 400),
  ],
)
def test_a_fusion_reads_what_it_uses(result, inside, size):
  (found,) = estimates.work(fusion(result, inside)).operations
  assert found.bytes == size
  assert (found.op_name, found.cycles, found.times) == ("jit(f)/a(b)", 12, 1)
  rates = estimates.Rates(flops=10.0, bandwidth=2.0, clock=1.0)
  assert found.seconds(rates) == size / 2


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_without_loops_the_seconds_are_xlas(topology):
  # In a process of its own: libtpu, once loaded, stays.
  code = f"""
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from engram_jax.analysis.ahead_of_time import tpu_devices
from engram_jax.analysis.compiled import cost
from engram_jax.analysis.estimates import RATES, work

devices = tpu_devices("{topology}")
place = NamedSharding(Mesh(devices[:1], ("x",)), PartitionSpec())
rates = RATES["{topology[:3]}"]

def costs(f, *shapes):
  given = [jax.ShapeDtypeStruct(s, "bfloat16", sharding=place) for s in shapes]
  lowered = jax.jit(f).trace(*given).lower(lowering_platforms=("tpu",))
  compiled = lowered.compile()
  every = work(compiled.as_text()).operations
  products = sum(o.times * o.cycles for o in every if o.flops)
  ours = cost(compiled, rates) | {{"products": products}}
  return ours, compiled.cost_analysis()

def layer(x, w):
  return jnp.tanh(x @ w), None

wide, square = (4096, 2048), (2048, 2048)
for f, shapes in (
  (lambda x: x + 1, (wide,)),
  (lambda x: jax.nn.softmax(x.astype(jnp.float32)), ((8192, 8192),)),
  (lambda x, w: x @ w, ((8192, 8192),) * 2),
):
  ours, xla = costs(f, *shapes)
  assert abs(ours["optimal_seconds"] / xla["optimal_seconds"] - 1) < 0.01, f
  assert ours["compiler_seconds"] > 0
  assert abs(ours["bytes_accessed"] / xla["bytes accessed"] - 1) < 0.01

stack = (6, *square)
rolled, xla = costs(lambda x, w: jax.lax.scan(layer, x, w)[0], wide, stack)
assert rolled["unknown_loops"] == 0
assert rolled["flops"] == 6 * 2 * 4096 * 2048**2
assert rolled["flops"] > 5 * xla["flops"]
unrolled, _ = costs(
  lambda x, w: jax.lax.scan(layer, x, w, unroll=6)[0], wide, stack)
# The loop copies its state at each turn; the products are the same.
assert 0.8 < rolled["optimal_seconds"] / unrolled["optimal_seconds"] < 1.5
assert 0.9 < rolled["products"] / unrolled["products"] < 1.1
"""
  subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
