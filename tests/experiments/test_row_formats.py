"""Row formats on a model: their errors and losses are what they are called."""

import dataclasses
import json
import types

import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.stores.open_store import open_store
from engram_jax.stores.quantization import FORMATS, RowFormat, pack_rows
from engram_jax.training.evaluation import mean_loss
from experiments.benchmarks import row_formats
from experiments.benchmarks.models import make_setup
from tests.experiments.micro import experiment

#: Of the relative error of normal rows 32 wide.
BOUNDS = {
  "float32": (0, 0),
  "bfloat16": (1e-3, 3e-3),
  "int8": (3e-3, 8e-3),
  "fp8": (0.02, 0.04),
}


pytestmark = pytest.mark.usefixtures("steps_compile_fast")


def make_trained(width=32):
  """A new model."""
  config = experiment()
  memory = dataclasses.replace(config.model.engram, head_dim=width)
  model = dataclasses.replace(config.model, engram=memory, moe=None)
  config = dataclasses.replace(config, model=model)
  setup = make_setup(config.model, config.train)
  state = setup.init_state()
  return types.SimpleNamespace(
    config=config,
    step=7,
    model=setup.merge_model(state),
    tables=state.tables,
    memory=setup.memory,
    setup=setup,
  )


@pytest.fixture(scope="module")
def trained():
  return make_trained()


@pytest.fixture(scope="module")
def batches():
  """Three, the last with fewer targets."""
  random = np.random.default_rng(0)
  made = []
  for targets in (32, 32, 9):
    tokens = random.integers(0, 300, (2, 17)).astype(np.int32)
    made.append(
      {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "breaks": np.zeros((2, 16), np.int8),
        "loss_mask": (np.arange(32) < targets).reshape(2, 16),
      }
    )
  return made


@pytest.fixture(scope="module")
def found(trained, batches):
  return row_formats.compare(trained, batches)


def test_losses_are_those_of_an_evaluation(trained, batches, found):
  assert json.loads(json.dumps(found)) == found
  assert (found["batches"], found["targets"]) == (3, 73)
  assert len(set(found["loss"].values())) == 3
  assert found["worth"] == found["loss"]["off"] - found["loss"]["on"]
  store = open_store(
    "host", trained.tables, trained.memory.hashing, row_format="fp8"
  )
  loss = mean_loss(trained.setup, trained.model, store, batches)
  fp8, float32 = found["formats"]["fp8"], found["formats"]["float32"]
  assert fp8["loss"] == pytest.approx(loss, rel=1e-6)
  assert fp8["difference"] == pytest.approx(loss - float32["loss"], abs=1e-6)
  assert fp8["of_worth"] == pytest.approx(fp8["difference"] / found["worth"])
  assert float32["difference"] == float32["standard_error"] == 0


def test_errors_are_those_of_the_formats(trained, batches, found):
  assert list(found["formats"]) == list(FORMATS)
  sizes = [x["bytes_per_row"] for x in found["formats"].values()]
  assert sizes == [128, 64, 33, 36]
  for name, (least, most) in BOUNDS.items():
    assert least <= found["formats"][name]["error"] <= most, name
  # Each of the 73 positions with a target reads four columns.
  reads = row_formats.reads_of(trained.setup, batches)
  assert {layer: x.sum() for layer, x in reads.items()} == {1: 73 * 4}


def test_errors_are_weighted():
  fmt = RowFormat("int8", 2)
  rows = np.array([[127.0, 1.0], [127.0, 1.5], [0.0, 0.0]], np.float32)
  packed = pack_rows(rows, fmt)
  tables = {3: np.concatenate([rows, rows])}  # padding is left out

  def error(*weights):
    return row_formats.error_of(tables, {3: packed}, fmt, {3: weights})

  assert error(1, 0, 1) == error(0, 0, 1) == 0
  rms = np.sqrt(0.25 / np.square(rows).sum())
  assert error(2, 2, 0) == pytest.approx(rms, rel=1e-6)


def test_another_loss_in_float32_is_an_error(trained, batches, monkeypatch):
  monkeypatch.setattr(row_formats, "TOLERANCE", -1)
  with pytest.raises(RuntimeError, match="float32 rows: loss"):
    row_formats.compare(trained, batches)


def test_a_pair_differs_by_its_mean_and_error():
  base = np.array([[10.0, 10], [20, 10], [3, 10]])
  losses = base + np.array([[1, 0], [2, 0], [3, 0]])
  difference, error = row_formats.paired(losses, base)
  assert difference == pytest.approx(0.2)
  assert error == pytest.approx(0.1 / np.sqrt(3))
  assert row_formats.paired(base, base) == (0, 0)
  # As many nats per token in a batch with fewer targets: no spread.
  base[2, 1] = 5
  losses = base + 0.1 * base[:, 1:] * np.array([1, 0])
  assert row_formats.paired(losses, base) == pytest.approx((0.1, 0))


def test_a_run_is_shown_with_its_scale(monkeypatch, batches, tmp_path):
  def held_out(*_, most, **__):
    return iter(batches[:most])

  # Of the run's width fp8 cannot be.
  narrow = make_trained(4)
  monkeypatch.setattr(row_formats, "FORMATS", ("float32", "fp8"))
  monkeypatch.setattr(row_formats, "load_run", lambda _: narrow)
  monkeypatch.setattr(row_formats, "prepare", lambda *_, **__: None)
  monkeypatch.setattr(row_formats, "held_out_batches", held_out)
  result = row_formats.measure(workdir=[str(tmp_path)], batches=2)
  (run,) = result["runs"]
  assert run["batches"] == 2
  refused = "width: 4; valid: a positive multiple of 32 for fp8"
  assert run["formats"]["fp8"] == {"refused": refused}
  text = "\n".join(row_formats.tables(result))
  for words in (
    "step 7: 64 targets",
    "memory off",
    f"fp8 left out: {refused}",
  ):
    assert words in text, words


def test_what_cannot_be_compared_is_refused(trained, batches):
  with pytest.raises(InputError, match=r"^batches: 1; valid: 2 or more"):
    row_formats.compare(trained, batches[:1])
  plain = types.SimpleNamespace(memory=None)
  with pytest.raises(InputError, match=r"^workdir: no memory; valid: a run"):
    row_formats.compare(plain, batches)
