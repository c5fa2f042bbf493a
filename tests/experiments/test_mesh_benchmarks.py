"""The benchmarks of several devices, at tiny sizes; no time is judged."""

import json

import jax
import numpy as np
import pytest

from engram_jax.errors import InputError
from experiments.benchmarks import harness, sharded_lookup, table_scaling
from experiments.benchmarks.fixtures import draw_ids
from experiments.benchmarks.sharded_lookup import (
  BOTH,
  LOOKED_UP,
  STRATEGIES,
  WHAT,
)
from tests.experiments.test_benchmarks import MODEL_SIZES

LOOKUP = dict(
  devices=2, ids=[8], distributions=["zipf"], rows=101, width=4, repeats=1
)


def in_two(function, **arguments):
  env = harness.simulated_devices(2)
  return harness.in_child(function, env=env, **arguments)


# --- lookup ---


@pytest.mark.parametrize("distribution", ["zipf", "uniform"])
def test_ids_and_what_they_ask_for(distribution):
  devices, rows = 4, 400
  ids = draw_ids(distribution, (devices, 50), rows)
  assert ids.dtype == np.int32
  assert 0 <= ids.min() and ids.max() < rows
  found = sharded_lookup.demand(ids, rows)
  asked = np.zeros((devices, devices))
  for device, part in enumerate(ids):
    for row in set(part.tolist()):
      asked[device, row // 100] += 1
  assert found["distinct"] == pytest.approx(asked.sum() / ids.size)
  assert found["needed"] == asked.max()
  elsewhere = asked.sum() - np.trace(asked)
  assert found["foreign"] == pytest.approx(elsewhere / devices)


def test_room_is_what_training_comes_to_have():
  found = [sharded_lookup.capacity_for(64, 8, n) for n in (8, 16, 60)]
  assert found == [8, 18, 64]


def test_bytes_sent():
  text = """HloModule m

ENTRY %main (p: f32[8,10]) -> f32[8,10] {
  %p = f32[8,10]{1,0} parameter(0)
  %a = f32[8,10]{1,0} all-to-all(%p), dimensions={0}
  %g = f32[32,10]{1,0} all-gather(%a), dimensions={0}
  %s = f32[2,10]{1,0} reduce-scatter(%a), dimensions={0}
  %c = f32[2,10]{1,0} collective-permute(%s), source_target_pairs={{0,1}}
  ROOT %r = f32[8,10]{1,0} all-reduce(%a), to_apply=%add
}
"""
  # In 80 bytes: 4 of its own part, 16 gathered, 4, 1 to the neighbour, and 4
  # there and back.
  assert sharded_lookup.bytes_sent(text, 4) == 80 * (3 + 12 + 3 + 1 + 6)


def test_lookup():
  (record,) = in_two(sharded_lookup.on_devices, **LOOKUP)["records"]
  assert {"devices", "distribution", "ids", "calls", *STRATEGIES} < set(record)
  assert 0 < record["distinct"] <= 1 <= record["needed"] <= 8
  for strategy in STRATEGIES:
    for what in WHAT:
      found = record[strategy][what]
      assert set(found) == {"median_ms", "min_ms", "sent", "least", "wasted"}
      assert 0 < found["least"] < found["sent"]
      assert found["wasted"] == 1 - found["least"] / found["sent"]
    both, looked_up = record[strategy][BOTH], record[strategy][LOOKED_UP]
    assert both["least"] == 2 * looked_up["least"]
  ids, row = 4, 16
  sent = record["capacity"] * (ids + row)  # to the other device
  exchange = record["exchange"]
  assert exchange[LOOKED_UP]["sent"] == sent
  assert exchange[BOTH]["sent"] == sent + record["capacity"] * row
  assert record["gather"][LOOKED_UP]["sent"] == 8 * (ids + row)


def test_a_strategy_that_gives_other_rows_is_found_out(monkeypatch):
  auto = (jax.sharding.AxisType.Auto,) * 4
  axes = ("replica", "data", "expert", "tensor")
  mesh = jax.make_mesh((1, 1, 1, 1), axes, axis_types=auto)

  def wrong(mesh, strategy, what, capacity):
    return jax.jit(lambda table, ids, gradients: table[ids] + 1)

  monkeypatch.setattr(sharded_lookup, "make_form", wrong)
  table, ids = np.ones((6, 4), np.float32), np.zeros((1, 4), np.int32)
  with pytest.raises(RuntimeError, match=r"exchange, lookup: not what the tab"):
    sharded_lookup.in_turns(mesh, table, ids, calls=1, repeats=1)


def test_lookup_refuses():
  with pytest.raises(InputError, match=r"^devices: 3; valid: this process's 2"):
    in_two(sharded_lookup.on_devices, **{**LOOKUP, "devices": 3})
  with pytest.raises(InputError, match=r"^distributions: flat; valid: of zipf"):
    in_two(sharded_lookup.on_devices, **{**LOOKUP, "distributions": ["flat"]})


def test_lookup_as_a_program_says_it(tmp_path):
  answer = sharded_lookup.measure(**{**LOOKUP, "devices": [2]})
  assert json.loads(json.dumps(answer)) == answer
  text = "\n".join(sharded_lookup.tables(answer))
  assert "zipf  " in text and "KiB that a device sends" in text


# --- table scaling ---


def test_table_scaling_on_two_devices_takes_the_same_steps():
  # The whole step is compared in tests/eight_devices.
  arguments = dict(runs=[["sparse", 200]], repeats=1, **MODEL_SIZES)
  both = [
    in_two(table_scaling.in_turns, devices=devices, **arguments)["records"]
    for devices in (1, 2)
  ]
  for one, two in zip(*both, strict=True):
    assert set(two) == {*one, "capacity"}
    assert two["capacity"] is None  # few ids are gathered
    assert (one["form"], one["rows"]) == (two["form"], two["rows"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_table_scaling_makes_room_for_every_batch():
  sizes = {**MODEL_SIZES, "length": 256}  # 1024 ids a device
  runs = [["sparse", 100_000]]
  answer = in_two(
    table_scaling.in_turns, runs=runs, devices=2, repeats=1, **sizes
  )
  assert 0 < answer["records"][0]["capacity"] <= 1024
