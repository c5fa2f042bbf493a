"""Tests of checkpoints: what comes back, and what is refused."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.data.pipeline import batches
from engram_jax.data.prepared import prepare
from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import row_sparse
from engram_jax.memory.row_transformations import scale_by_adam_per_row
from engram_jax.run_config import DataConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.run_metadata import require_same_run
from engram_jax.training.state import TrainState, flatten, unflatten
from engram_jax.training.step import make_train_step

METADATA = {"config": {"model": {"hidden_size": 64}}, "hash": None}


def make_state(rows: int = 40) -> TrainState:
  """A state with every kind of leaf; nothing of a model behind it."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = nnx.State(
    {"block": {"w": nnx.Param(draw(5, 3)), "scale": nnx.Param(draw(3))}}
  )
  tables = {1: draw(rows, 8), 14: draw(rows, 4).astype(jnp.bfloat16)}
  optimizers = {
    1: row_sparse(scale_by_adam_per_row()),
    14: row_sparse(optax.scale_by_adam()),
  }
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    balance=nnx.State({"bias": nnx.Variable(draw(6))}),
    opt_state=optax.adamw(1.0).init(params),
    tables=tables,
    table_states={i: optimizers[i].init(t) for i, t in tables.items()},
  )


def at(step: int, state: TrainState | None = None) -> TrainState:
  """The state with another step."""
  state = make_state() if state is None else state
  return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def host(tree):
  """A copy of the leaves that shares nothing with them."""
  return {name: np.array(leaf) for name, leaf in flatten(tree).items()}


def assert_same(tree, expected: dict[str, np.ndarray]):
  found = host(tree)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    assert found[name].dtype == leaf.dtype, name
    # Bytes, so that NaNs and signs of zeros count.
    assert found[name].tobytes() == leaf.tobytes(), name


def shapes(tree):
  return jax.eval_shape(lambda: tree)


def save(folder, *steps, state=None, **options):
  with Checkpoints(folder, keep_last=9, keep_best=0) as checkpoints:
    for step in steps:
      checkpoints.save(step, at(step, state), run_metadata=METADATA, **options)


# --- what comes back ---


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
  state = make_state()
  leaves = flatten(state)
  odd = np.array([np.nan, -0.0, np.inf, 1e-45, 1.0, -1.0], np.float32)
  leaves["balance/bias"] = jnp.asarray(odd)
  state = at(7, unflatten(state, leaves))
  assert state.tables[14].dtype == ml_dtypes.bfloat16
  assert leaves["table_states/1/count"].shape == (40,)
  assert leaves["table_states/14/count"].shape == ()
  expected = host(state)
  save(tmp_path, 7, state=state)
  for template in (state, shapes(state)):
    with Checkpoints.open(tmp_path) as checkpoints:
      restored = checkpoints.restore(template)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, expected)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))


def test_weights_come_back_without_the_optimizer(tmp_path):
  state = at(3)
  save(tmp_path, 3, state=state)
  # Not even looked at: inference has no optimizer, and memory may be alone.
  shutil.rmtree(tmp_path / "3" / "optimizer")
  template = dataclasses.replace(
    shapes(state), opt_state=None, table_states={}, step=state.step
  )
  with Checkpoints.open(tmp_path) as checkpoints:
    params, balance, tables = checkpoints.restore_weights(template)
    with pytest.raises(InputError, match=r"^optimizer: .*; valid: undamaged f"):
      checkpoints.restore(shapes(state))
  assert_same(params, host(state.params))
  assert_same(balance, host(state.balance))
  assert_same(tables, host(state.tables))
  assert list(tables) == [1, 14]


def test_a_model_without_memory(tmp_path):
  state = at(2)
  state = dataclasses.replace(state, tables={}, table_states={})
  save(tmp_path, 2, state=state)
  assert not (tmp_path / "2" / "memory").exists()
  with Checkpoints.open(tmp_path) as checkpoints:
    assert_same(checkpoints.restore(shapes(state)), host(state))
    params, _, tables = checkpoints.restore_weights(shapes(state))
    assert tables == {} and set(flatten(params)) == {"block/w", "block/scale"}
    with pytest.raises(InputError, match=r"^memory/tables/1: missing in the "):
      checkpoints.restore(shapes(make_state()))


def test_donated_steps_do_not_reach_a_save_in_progress(tmp_path):
  # 32 MiB: far longer to write than a step takes.
  state = make_state(rows=1 << 20)
  step = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree),
    donate_argnums=0,
  )
  state = step(state)
  expected = host(state)
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    checkpoints.save(1, state, run_metadata=METADATA)
    for _ in range(4):
      state = step(state)
    jax.block_until_ready(state)
  assert int(state.step) == 5
  with Checkpoints.open(tmp_path) as checkpoints:
    restored = checkpoints.restore(shapes(state))
  assert_same(restored, expected)
  # And the restored arrays may be donated in their turn.
  for _ in range(4):
    restored = step(restored)
  assert_same(restored, host(state))


def test_run_metadata_comes_back(tmp_path):
  metadata = {
    "config": {"model": {"layers": (1, 14), "eps": 1e-6, "tie": True}},
    # Beyond what a float holds.
    "hash": {"multipliers": [[2**62 + 1, 3]]},
    "compression": None,
  }
  with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, at(step), run_metadata=metadata | {"step": step})
    found = checkpoints.read_run_metadata()
    assert checkpoints.read_run_metadata(1)["step"] == 1
  assert found.pop("step") == 2
  assert found["config"]["model"] == {
    "layers": [1, 14],
    "eps": 1e-6,
    "tie": True,
  }
  assert found["hash"]["multipliers"][0][0] == 2**62 + 1
  require_same_run(found, metadata)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for number in range(12):
    words = rng.choice(["def", "return", "self", "if", "for"], size=80)
    (folder / f"module{number}.py").write_text(" ".join(words))
  return prepare(
    DataConfig(
      folder=str(folder),
      data_dir=str(tmp_path_factory.mktemp("data")),
      vocab_size=258,
      validation_percent=20,
    )
  )


def test_a_resumed_run_is_the_uninterrupted_one(
  tmp_path, prepared, tiny, train_step, make_tiny
):
  def new_iterator():
    return iter(batches(prepared, "train", seq_len=12, batch_size=4, seed=1))

  def run(state, step, iterator, count):
    losses = []
    for _ in range(count):
      batch = dict(next(iterator))
      for name in ("inputs", "targets"):
        batch[name] = batch[name] % tiny.setup.model.vocab_size
      state, metrics = step(state, batch)
      losses.append(np.asarray(metrics["loss"]).tobytes())
    return state, losses

  iterator = new_iterator()
  state, expected = run(tiny.state(), train_step, iterator, 6)
  expected_state, expected_batch = host(state), next(iterator)
  assert len(set(expected)) == 6

  iterator = new_iterator()
  state, first = run(tiny.state(), train_step, iterator, 3)
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    checkpoints.save(3, state, data_iterator=iterator, run_metadata=METADATA)
    # The iterator runs on, and the state is donated, while that is written.
    run(state, train_step, iterator, 2)

  # New objects throughout, as in a new process.
  again, iterator = make_tiny(), new_iterator()
  step = make_train_step(again.setup)
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    state = checkpoints.restore(again.abstract_state(), data_iterator=iterator)
  state, second = run(state, step, iterator, 3)
  assert first + second == expected
  assert_same(state, expected_state)
  for key, value in next(iterator).items():
    np.testing.assert_array_equal(value, expected_batch[key], strict=True)


# --- which are kept ---


def folders(path: pathlib.Path) -> list[str]:
  return sorted(child.name for child in path.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.0, 6: None, 7: 9.0}
  kept = {
    1: [1],
    2: [1, 2],
    3: [2, 3],
    4: [2, 3, 4],
    # Of two equal losses the earlier one counts.
    5: [2, 4, 5],
    6: [2, 5, 6],
    7: [2, 6, 7],
  }
  for step, loss in losses.items():
    # A new object each time: what it knows, it has read.
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
      assert checkpoints.latest_step() == (step - 1 or None)
      checkpoints.save(step, at(step), run_metadata=METADATA, eval_loss=loss)
      checkpoints.wait()
      assert checkpoints.steps() == kept[step]
      assert checkpoints.best_step() == (1 if step == 1 else 2)
    assert folders(tmp_path) == [str(step) for step in kept[step]]
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    checkpoints.save(8, at(8), run_metadata=METADATA, eval_loss=0.5)
    assert checkpoints.best_step() == 8
  assert folders(tmp_path) == ["8"]


def test_without_evaluations_nothing_is_best(tmp_path):
  with Checkpoints(tmp_path, keep_last=1, keep_best=3) as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.steps() == []
    for step in (1, 2, 3):
      checkpoints.save(step, at(step), run_metadata=METADATA)
    assert checkpoints.best_step() is None
  assert folders(tmp_path) == ["3"]


def test_an_interrupted_deletion_leaves_no_checkpoint(tmp_path, monkeypatch):
  # As if killed after the rename, before the deletion.
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, at(step), run_metadata=METADATA)
  assert (tmp_path / "deleted" / "1").exists()
  with Checkpoints.open(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2]
  # A reader changes nothing, the next run cleans up.
  assert folders(tmp_path) == ["2", "deleted"]
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    assert checkpoints.steps() == [2]
  assert folders(tmp_path) == ["2"]


def test_an_unfinished_save_is_not_seen(tmp_path):
  save(tmp_path, 1, 2)
  unfinished = tmp_path / "3.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "2", unfinished)
  shutil.rmtree(unfinished / "memory")
  with Checkpoints.open(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 2
    assert int(checkpoints.restore(shapes(make_state())).step) == 2
  # A reader must not touch what a run may be writing.
  assert unfinished.exists()
  save(tmp_path, 3)
  assert folders(tmp_path) == ["1", "2", "3"]


# --- what is refused ---


# Orbax leaves its other reads behind when one fails.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine"
)
def test_damaged_files_never_load_wrong(tmp_path):
  state = at(5)
  expected = host(state)
  save(tmp_path / "good", 5, state=state, eval_loss=1.5)
  files = sorted(p for p in (tmp_path / "good").rglob("*") if p.is_file())
  assert len(files) > 20
  rng = np.random.default_rng(0)

  def flip(data):
    data = bytearray(data)
    if data:
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)

  damages = {
    "flipped": flip,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
  }
  refused = dict.fromkeys(damages, 0)
  for number, file in enumerate(files):
    whole = file.read_bytes()
    for name in ("flipped", ("cut", "empty")[number % 2]):
      damage = damages[name]
      file.write_bytes(damage(whole))
      try:
        with Checkpoints.open(tmp_path / "good") as checkpoints:
          # A damaged document of its own makes it no whole checkpoint.
          assert checkpoints.steps() in ([5], [])
          found = checkpoints.restore(shapes(state))
          metadata = checkpoints.read_run_metadata()
      except InputError as error:
        assert "\n" not in str(error)
        refused[name] += 1
      else:
        assert_same(found, expected)
        assert metadata == METADATA
    file.write_bytes(whole)
  # The others hold nothing that is read, such as the time of the save.
  assert min(refused.values()) >= 5, refused


def test_a_flipped_bit_is_refused_by_the_name_of_its_array(tmp_path):
  state = at(5, make_state(rows=5000))
  save(tmp_path, 5, state=state)
  files = (p for p in (tmp_path / "5" / "memory").rglob("*") if p.is_file())
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  message = (
    r"^memory/tables/1: not what was saved; valid: an undamaged checkpoint "
    r"in .*/5; there are \[5\]$"
  )
  with Checkpoints.open(tmp_path) as checkpoints:
    with pytest.raises(InputError, match=message):
      checkpoints.restore(shapes(state))


def test_a_missing_checkpoint_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"^directory: .*/none; valid: a folder"):
    Checkpoints.open(tmp_path / "none")
  assert not (tmp_path / "none").exists()
  template = shapes(make_state())
  with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
    for call in (
      lambda: checkpoints.restore(template),
      lambda: checkpoints.restore_weights(template),
      checkpoints.read_run_metadata,
    ):
      with pytest.raises(InputError, match=r"^directory: no checkpoint in /"):
        call()
    checkpoints.save(4, at(4), run_metadata={})
    with pytest.raises(
      InputError, match=r"^step: 3; valid: one of the steps 4$"
    ):
      checkpoints.restore(template, step=3)


def test_other_arrays_are_refused(tmp_path):
  state = at(1)
  save(tmp_path, 1, state=state)
  template = shapes(state)
  leaves = flatten(template)

  def changed(name, shape, dtype):
    struct = jax.ShapeDtypeStruct(shape, dtype)
    return unflatten(template, leaves | {name: struct})

  more = {**template.tables, 3: jax.ShapeDtypeStruct((2, 2), jnp.float32)}
  fewer = {1: template.tables[1]}
  for other, message in (
    (
      changed("tables/1", (41, 8), jnp.float32),
      r"memory/tables/1: float32\[40, 8\] in the checkpoint; valid: "
      r"float32\[41, 8\]$",
    ),
    (
      changed("tables/14", (40, 4), jnp.float32),
      r"memory/tables/14: bfloat16\[40, 4\] in the checkpoint; valid: float32",
    ),
    (
      changed("params/block/w", (3, 5), jnp.float32),
      r"backbone/params/block/w: float32\[5, 3\] in",
    ),
    (
      changed("table_states/14/count", (40,), jnp.int32),
      r"optimizer/table_states/14/count: int32\[\] in",
    ),
    (
      dataclasses.replace(template, tables=more),
      r"memory/tables/3: missing in the checkpoint; valid: float32\[2, 2\]$",
    ),
    (
      dataclasses.replace(template, tables=fewer),
      r"memory/tables/14: bfloat16\[40, 4\] in the checkpoint; valid: no such ",
    ),
  ):
    with Checkpoints.open(tmp_path) as checkpoints:
      with pytest.raises(InputError, match=f"^{message}"):
        checkpoints.restore(other)


def test_bad_arguments_are_refused(tmp_path, prepared):
  for arguments, message in (
    ({"keep_last": 0, "keep_best": 1}, "keep_last: 0; valid: at least 1"),
    ({"keep_last": 1, "keep_best": -1}, "keep_best: -1; valid: >= 0"),
  ):
    with pytest.raises(InputError, match=f"^{message}$"):
      Checkpoints(tmp_path, **arguments)
  iterator = iter(batches(prepared, "train", seq_len=12, batch_size=4))
  with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
    checkpoints.save(2, at(2), run_metadata={})
    for step, options, message in (
      (2, {}, "step: 2; valid: a step after the latest checkpoint, 2"),
      (1, {}, "step: 1; valid: a step after"),
      (3, {"eval_loss": float("nan")}, "eval_loss: nan; valid: a finite"),
    ):
      with pytest.raises(InputError, match=f"^{message}"):
        checkpoints.save(step, at(step), run_metadata={}, **options)
    with pytest.raises(InputError, match=r"^step: 4; valid: state.step, 3$"):
      checkpoints.save(4, at(3), run_metadata={})
    with pytest.raises(InputError, match=r"^data_iterator: not in step 2;"):
      checkpoints.restore(shapes(make_state()), data_iterator=iterator)
  with Checkpoints.open(tmp_path) as checkpoints:
    with pytest.raises(InputError, match=r"^step: 5; valid: a step to be"):
      checkpoints.save(5, at(5), run_metadata={})
  assert folders(tmp_path) == ["2"]
