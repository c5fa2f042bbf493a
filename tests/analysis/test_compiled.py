"""The reader of compiled programs, on texts as XLA writes them.

On real programs for eight devices: tests/eight_devices/test_compiled.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.analysis.compiled import (
  collective_bytes,
  collective_counts,
  collectives,
  copies,
  cost,
  largest_temporaries,
  memory_report,
  of_table,
  top_operations,
)
from engram_jax.analysis.estimates import Rates


def entry(*lines):
  """A program of these instructions."""
  body = "\n".join(f"  {line}" for line in lines)
  return (
    "HloModule jit_f, is_scheduled=true\n\n"
    "%add (a: f32[], b: f32[]) -> f32[] {\n"
    "  %a = f32[] parameter(0)\n"
    "  %b = f32[] parameter(1)\n"
    "  ROOT %sum = f32[] add(%a, %b)\n"
    "}\n\n"
    f"ENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"
  )


X = "%x = f32[8,4]{1,0:T(8,128)} parameter(0)"
GROUPS = 'channel_id=1, replica_groups={{0,1},{2,3}}, metadata={op_name="a(b"}'


def summary(text):
  records = collectives(text)
  assert all(r.times == r.count and not r.in_loop for r in records)
  return [(r.kind, r.dtype, r.shape, r.bytes, r.count) for r in records]


@pytest.mark.parametrize(
  "line, expected",
  [
    (
      f"%g = f32[16,4]{{1,0}} all-gather(%x), {GROUPS}",
      ("all-gather", "f32", (16, 4), 256, 1),
    ),
    (  # the operand is the larger side
      f"%s = f32[2,4]{{1,0}} reduce-scatter(%x), {GROUPS}, to_apply=%add",
      ("reduce-scatter", "f32", (8, 4), 128, 1),
    ),
    (
      f"ROOT r = f32[8,4]{{1,0}} all-reduce(x), {GROUPS}, to_apply=add",
      ("all-reduce", "f32", (8, 4), 128, 1),
    ),
    (
      "%p = f32[8,4]{1,0} collective-permute(%x), "
      "source_target_pairs={{0,1},{1,0}}",
      ("collective-permute", "f32", (8, 4), 128, 1),
    ),
    (
      f"%b = f32[8,4]{{1,0}} collective-broadcast(%x), {GROUPS}",
      ("collective-broadcast", "f32", (8, 4), 128, 1),
    ),
    (
      f"%t = f32[9,4]{{1,0}} ragged-all-to-all(%x, %x), {GROUPS}",
      ("ragged-all-to-all", "f32", (8, 4), 256, 1),
    ),
    (  # XLA:CPU's, one array per device, with comments in the type
      "%t = (f32[4,4]{1,0}, /*index=1*/f32[4,4]{1,0}) "
      "all-to-all(f32[4,4]{1,0} %u, /*index=1*/f32[4,4]{1,0} %v), "
      f"{GROUPS}",
      ("all-to-all", "f32", (4, 4), 128, 1),
    ),
    (  # arrays that XLA joined; a TPU may give fewer bits than it takes
      f"%r = (bf16[2,2]{{1,0}}, bf16[8,4]{{1,0:T(8,128)(2,1)}}) "
      f"all-reduce(%y, %x), {GROUPS}, to_apply=%add",
      ("all-reduce", "f32", (8, 4), 128 + 16, 1),
    ),
  ],
)
def test_reads_every_kind(line, expected):
  y = "%y = f32[2,2]{1,0} constant({...})"
  assert summary(entry(X, y, line)) == [expected]


@pytest.mark.parametrize(
  "type_, size",
  [
    ("bf16[3,5]{1,0}", 30),
    ("pred[7]{0}", 7),
    ("s4[5]{0:E(4)}", 3),
    ("f8e4m3fn[6]{0}", 6),
    ("c64[2]{0}", 16),
    ("u32[]", 4),
    ("f32[<=9,2]{1,0}", 72),
    ("f32[0,8]{1,0}", 0),
    ("token[]", 0),
  ],
)
def test_counts_bytes_by_dtype(type_, size):
  text = entry(
    f"%x = {type_} parameter(0)", f"%r = {type_} all-reduce(%x), {GROUPS}"
  )
  (record,) = collectives(text)
  assert record.bytes == size


def test_an_asynchronous_operation_counts_once():
  text = entry(
    X,
    "%g-start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), "
    f"{GROUPS}",
    "%g-done = f32[16,4]{1,0} all-gather-done(%g-start)",
    f"%r-start = f32[8,4]{{1,0}} all-reduce-start(%x), {GROUPS}",
    "%r-done = f32[8,4]{1,0} all-reduce-done(%r-start)",
    "%v-start = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%x, %x), "
    f"{GROUPS}",
    "%v-done = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-done(%v-start)",
    "%p-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)S(1)}, "
    "u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
    "source_target_pairs={{0,1},{1,0}}",
    "%p-done = f32[8,4]{1,0} collective-permute-done(%p-start)",
    "%t-start = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) all-to-all-start(%x), "
    f"{GROUPS}",
    "%t-done = f32[8,4]{1,0} all-to-all-done(%t-start)",
    "%s-start = ((f32[8,4]{1,0}), f32[4,4]{1,0}) reduce-scatter-start(%x), "
    f"{GROUPS}",
    "%s-done = f32[4,4]{1,0} reduce-scatter-done(%s-start)",
  )
  assert summary(text) == [
    ("all-gather", "f32", (16, 4), 256, 1),
    ("all-reduce", "f32", (8, 4), 256, 1),
    ("all-reduce", "f32", (8, 4), 128, 1),
    ("all-to-all", "f32", (8, 4), 128, 1),
    ("collective-permute", "f32", (8, 4), 128, 1),
    ("reduce-scatter", "f32", (8, 4), 128, 1),
  ]


def test_a_wrapped_operation_counts_once():
  wrapped = (
    "%wrapped (p: f32[8,4]) -> f32[8,4] {\n"
    "  %p = f32[8,4]{1,0} parameter(0)\n"
    f"  ROOT %t = f32[8,4]{{1,0}} all-to-all(%p), {GROUPS}\n"
    '}, execution_thread="parallel"\n\n'
  )
  text = wrapped + entry(
    X,
    "%s = ((f32[8,4]{1,0}), f32[8,4]{1,0}, s32[]) async-start(%x), "
    "calls=%wrapped",
    "%u = ((f32[8,4]{1,0}), f32[8,4]{1,0}, s32[]) async-update(%s), "
    "calls=%wrapped",
    "%d = f32[8,4]{1,0} async-done(%u), calls=%wrapped",
  )
  assert summary(text) == [("all-to-all", "f32", (8, 4), 128, 1)]


def test_a_tpu_writes_one_operation_in_several_computations():
  def piece(name, flag, rest):
    return (
      f"%{name} (p: f32[8,4]) -> f32[16,4] {{\n"
      f"  %p.{name} = f32[8,4]{{1,0:T(8,128)}} parameter(0)\n"
      f"  %g.{name} = f32[16,4]{{1,0:T(8,128)}} all-gather(%p.{name}), "
      f'{GROUPS}, frontend_attributes={{chain_id="0"}}, backend_config={{'
      '"barrier_config":{"barrier_type":"CUSTOM","id":"0"},'
      f'"async_collective_fusion_config":{{"flag_start":"{flag}",'
      f'"flag_end":"{flag}"}}}}\n'
      f"  ROOT %r.{name} = {rest}\n}}\n\n"
    )

  start = 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'
  done = 'custom-call(%g), custom_call_target="AsyncCollectiveDone"'
  text = (
    piece("start", -1, f"(f32[8,4]{{1,0}}, u32[]{{:S(2)}}) {start}")
    + piece("between", 2, "f32[8,4]{1,0} tuple(%p)")
    + piece("done", 2, f"f32[16,4]{{1,0}} {done}")
    + entry(X, "%f = f32[16,4]{1,0} fusion(%x), kind=kCustom, calls=%start")
  )
  assert summary(text) == [("all-gather", "f32", (16, 4), 256, 1)]


def test_alike_operations_are_one_record():
  text = entry(
    X,
    *(f"%r.{i} = f32[8,4]{{0,1}} all-reduce(%x), {GROUPS}" for i in range(3)),
    f"%t = f32[8,4]{{1,0}} all-to-all(%x), {GROUPS}",
  )
  records = collectives(text)
  assert [(r.kind, r.count) for r in records] == [
    ("all-reduce", 3),
    ("all-to-all", 1),
  ]
  assert collective_bytes(records) == {"all-reduce": 384, "all-to-all": 128}
  assert collective_counts(records) == {"all-reduce": 3, "all-to-all": 1}
  assert collectives(entry(X)) == []
  assert collective_bytes([]) == collective_counts([]) == {}


def test_counts_what_loops_run():
  def computation(name, line):
    return (
      f"%{name} (p: f32[8,4]) -> f32[8,4] {{\n"
      f"  %p.{name} = f32[8,4]{{1,0}} parameter(0)\n  {line}\n}}\n\n"
    )

  def reduced(name):
    return f"ROOT %r.{name} = f32[8,4]{{1,0}} all-reduce(%p.{name}), {GROUPS}"

  text = (
    computation("inner", reduced("inner"))
    + computation("branch", reduced("branch"))
    + computation("free", "ROOT %r.f = f32[8,4]{1,0} all-to-all(%p.free)")
    + computation(
      "body",
      "ROOT %c = f32[8,4]{1,0} conditional(%p.body, %p.body), "
      "branch_computations={%inner, %branch}",
    )
    + computation("condition", "ROOT %lt = pred[] compare(%a, %b)")
    + entry(
      X,
      "%w = f32[8,4]{1,0} while(%x), condition=%condition, body=%body, "
      'backend_config={"known_trip_count":{"n":"5"}}',
      "ROOT %f = f32[8,4]{1,0} call(%w), to_apply=%free",
    )
  )
  looped, skipped, free = collectives(text)
  assert (looped.kind, looped.count, looped.times) == ("all-reduce", 1, 5)
  assert looped.in_loop
  # The other branch of the conditional.
  assert (skipped.kind, skipped.count, skipped.times) == ("all-reduce", 1, 0)
  assert (free.kind, free.times, free.in_loop) == ("all-to-all", 1, False)
  sent = collective_bytes(collectives(text))
  assert sent == {"all-reduce": 5 * 128, "all-to-all": 128}


def test_finds_tables_in_any_shape():
  def found(shape):
    text = entry(X, f"%r = f32[{shape}] all-reduce(%y), {GROUPS}")
    return bool(of_table(collectives(text), rows=104, width=8, devices=8))

  # The table, a shard, two of them, flat, with another axis.
  for shape in ("104,8", "13,8", "26,8", "832", "8,13,8", "1,13,8"):
    assert found(shape), shape
  for shape in ("12,8", "13,4", "208,8", "", "8", "0,8"):
    assert not found(shape), shape


def test_finds_a_table_among_joined_arrays():
  text = entry(X, f"%r = (f32[900,9], f32[13,8]) all-reduce(%y, %z), {GROUPS}")
  (record,) = of_table(collectives(text), rows=104, width=8, devices=8)
  assert record.shape == (900, 9)
  assert ("f32", (13, 8)) in record.arrays


def test_copies():
  text = entry(
    X,
    "%c = f32[8,4]{0,1} copy(%x)",
    "%s = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%x)",
    "%d = f32[8,4]{1,0:S(1)} copy-done(%s)",
  )
  (record,) = copies(text)
  assert (record.kind, record.shape, record.count) == ("copy", (8, 4), 2)
  assert collectives(text) == []


RATES = Rates(flops=100.0, bandwidth=10.0, clock=4.0)


def test_cost_and_top_operations():
  text = (
    "%body (p: f32[8,4]) -> f32[8,4] {\n"
    "  %p = f32[8,4]{1,0} parameter(0)\n"
    "  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, "
    'rhs_contracting_dims={1}, metadata={op_name="while/body/dot"}, '
    'backend_config={"estimated_cycles":"20"}\n}\n\n'
    "%condition (q: f32[8,4]) -> pred[] {\n"
    "  ROOT %q = f32[8,4]{1,0} parameter(0)\n}\n\n"
  ) + entry(
    X,
    "%w = f32[8,4]{1,0} while(%x), condition=%condition, body=%body, "
    'backend_config={"known_trip_count":{"n":"3"}}',
    f"ROOT %t = f32[8,4]{{1,0}} all-to-all(%w), {GROUPS}",
  )
  product, moved = 2 * 8 * 8 * 4, 128 + 128 + 256
  expected = {
    "flops": 3 * product,
    "bytes_accessed": 3 * moved + 256,
    "optimal_seconds": 3 * moved / 10 + 25.6,
    "compiler_seconds": 3 * 20 / 4,
    "unpriced_bytes": 256,
    "unpriced_share": 256 / (3 * moved + 256),
    "unpriced_seconds": 25.6,
    "unknown_loops": 0,
    "conditionals": 0,
  }
  assert cost(text, RATES) == pytest.approx(expected)
  without = cost(text)
  seconds = ("optimal_seconds", "compiler_seconds", "unpriced_seconds")
  assert {without[name] for name in seconds} == {None}
  first, second = top_operations(text, RATES, count=5)
  assert first["op_name"] == "while/body/dot"
  assert (first["times"], first["flops"]) == (3, product)
  assert first["seconds"] == pytest.approx(3 * moved / 10)
  assert first["compiler_seconds"] == 15
  assert (second["name"], second["compiler_seconds"]) == ("t", None)
  assert len(top_operations(text, RATES, count=1)) == 1


REFUSED = """\
E1122 12:37:21 deepsea_compiler_base.cc:3781] Ran out. Memory usage report:

Memory Space: default (color=0)
Total bytes: 32051226112 (29.85GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   11.94GiB(100%);     512B;  12820496384;                1; (f32[4], s32[4])
    5.97GiB( 50%);    5.97GiB;   6410240000;                3; f32[4], 2×s32[4]
   11.94GiB(100%);    1.5MiB;            0;                5; 2×s32[40]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    9.97GiB(100%);    9.97GiB;            0;                3; 3×f32[4000,4000]
"""


def test_what_fills_a_memory_that_is_too_small():
  assert largest_temporaries(REFUSED) == [
    {"bytes": round(5.97 * 2**30), "shapes": "f32[4], 2×s32[4]"},
    {"bytes": 3 * 2**19, "shapes": "2×s32[40]"},
    {"bytes": 512, "shapes": "(f32[4], s32[4])"},
  ]
  assert largest_temporaries("nothing of the kind") == []


def test_of_a_real_program():
  x = jax.ShapeDtypeStruct((256, 128), np.float32)
  f = jax.jit(lambda x: x.at[3].add(jnp.sort(x, axis=0)[5]), donate_argnums=0)
  compiled = f.lower(x).compile()
  report = memory_report(compiled)
  size = 256 * 128 * 4
  assert report["argument"] == report["output"] == report["alias"] == size
  assert report["temp"] >= size
  assert report["total"] == size + report["temp"] + report["code"]
  assert report["peak"] >= size
  assert all(type(value) is int for value in report.values())
  assert cost(compiled)["bytes_accessed"] > size
  assert collectives(compiled) == []
