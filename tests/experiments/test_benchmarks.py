"""The benchmarks run at tiny sizes and say what they should; no time is judged.

Their comparisons are only worth something if both sides compute the same.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.training.step import make_train_step
from experiments.benchmarks import hash, models, table_scaling

pytestmark = pytest.mark.usefixtures("steps_compile_fast")

TIMES = {"median_ms", "min_ms", "first_s"}
MODEL_SIZES = dict(
  hidden_size=16,
  num_layers=2,
  heads=2,
  head_dim=4,
  batch=2,
  length=16,
  vocab_size=64,
)


# --- hash ---


def test_hash():
  cases = {"two": (1000, (101, 211)), "three": (1000, (101, 101, 101))}
  answer = hash.measure(tokens=[64, 128], repeats=1, length=32, cases=cases)
  records = answer["records"]
  assert [(r["case"], r["columns"], r["tokens"]) for r in records] == [
    ("two", 16, 64),
    ("two", 16, 128),
    ("three", 24, 64),
    ("three", 24, 128),
  ]
  forms = {"jnp", "numpy", "numpy_loop"}
  least = min(record["ratio"] for record in records)
  assert answer["targets"]["least ratio"]["value"] == least
  for record in records:
    assert set(record["ns_per_token"]) == forms
    assert set(record["min_ns_per_token"]) == forms


def test_loop_over_heads_is_the_hash():
  hashing = NgramHash.create(
    vocab_size=1000, rows_per_head=(101, 211), heads=3, layers=(1,), pad_id=2
  )
  ids = np.random.default_rng(0).integers(0, 1000, (3, 16))
  np.testing.assert_array_equal(
    hash.loop_over_heads(hashing, ids), hashing.row_ids_numpy(ids, 1)
  )


def test_hash_refuses_part_of_a_sequence():
  with pytest.raises(InputError, match=r"^tokens: 33; valid: a multiple of"):
    hash.measure(tokens=[33], repeats=1, length=32)


# --- table scaling ---


def test_table_scaling():
  runs = [("sparse", 100), ("dense", 200)]
  answer = table_scaling.in_turns(runs=runs, repeats=1, **MODEL_SIZES)
  records = answer["records"]
  assert [r["form"] for r in records] == ["sparse", "dense"]
  assert 100 <= records[0]["rows"] < 200 <= records[1]["rows"]
  keys = TIMES | {"form", "rows", "table_mib", "loss"}
  assert all(set(record) == keys for record in records)
  assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
  "run, devices, message",
  [
    (("other", 100), 1, "form: other; valid: one of sparse, dense"),
    (("sparse", 7), 1, "rows: 7; valid: at least 8, two a head"),
    (("sparse", 10**15), 1, "rows: .*; valid: what fits in"),
    (("dense", 100), 2, "form: dense; valid: one of sparse$"),
    (("sparse", 100), 3, "batch: 2; valid: a multiple of devices = 3"),
    (("sparse", 100), 2, "devices: 2; valid: 1, or this process's 1"),
  ],
)
def test_table_scaling_refuses(run, devices, message):
  with pytest.raises(InputError, match=f"^{message}"):
    table_scaling.in_turns(
      runs=[run], devices=devices, repeats=1, **MODEL_SIZES
    )


def test_sparse_and_dense_steps_start_alike():
  found = {}
  for form in table_scaling.TABLES:
    setup = table_scaling.make_setup(form, 100, **MODEL_SIZES)
    (batch,) = models.make_batches(setup, 1)
    state = table_scaling.make_state(setup)
    # The moments as a run has them at its start.
    states = jax.tree.map(jnp.zeros_like, state.table_states)
    state = dataclasses.replace(state, table_states=states)
    found[form] = make_train_step(setup)(state, batch)
  (sparse, by_rows), (dense, by_table) = found["sparse"], found["dense"]
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(by_rows[name], by_table[name], rtol=1e-5)
  # The dense form moves the rows that the batch has not touched nowhere: their
  # gradients and moments are 0.
  rate = 4e-4 * 5
  table, dense_table = sparse.tables[1], dense.tables[1]
  assert float(jnp.max(jnp.abs(table - 1e-3))) > 0.5 * rate
  np.testing.assert_allclose(table, dense_table, atol=0.01 * rate)
  (moment,) = {x.shape for x in jax.tree.leaves(dense.table_states) if x.ndim}
  assert moment == table.shape


def test_targets_are_of_the_largest_tables():
  def line(form, table_mib, peak_mib):
    return {"form": form, "table_mib": table_mib, "peak_mib": peak_mib}

  lines = [
    line("sparse", 1, 100),
    line("sparse", 50, 240),
    line("dense", 1, 900),
  ]
  pairs = [
    {"name": "step", "ratio": 1.5},
    {"name": "step", "ratio": 1.1},
    {"name": "dense", "ratio": 9.0},
  ]
  assert table_scaling.targets(lines, pairs) == {
    "step_ratio": {"value": 1.1, "at_most": 1.2, "reached": True},
    "peak_mib": {"value": 240, "at_most": 250, "reached": True},
  }
  lines[1]["peak_mib"], pairs[1]["ratio"] = 251, 1.21
  found = table_scaling.targets(lines, pairs)
  assert not any(one["reached"] for one in found.values())
