"""Tests of the training step against a dense one, and of what it must not do.

Compilation is most of the time here: tests share one compiled step wherever
they can.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.backbone.routing import updated_bias
from engram_jax.training.state import TrainState, flatten, unflatten
from engram_jax.training.step import make_train_step


def host(tree) -> dict[str, np.ndarray]:
  """A copy of the leaves that shares nothing with them."""
  return {name: np.array(leaf) for name, leaf in flatten(tree).items()}


def with_leaf(state: TrainState, name: str, change) -> TrainState:
  leaves = flatten(state)
  return unflatten(state, leaves | {name: change(leaves[name])})


def same_bits(one, other) -> list[str]:
  """Names of the leaves that differ."""
  return [n for n in one if one[n].tobytes() != other[n].tobytes()]


@pytest.fixture(scope="module")
def batch(make_batch):
  return make_batch()


@pytest.fixture(scope="module")
def stepped(tiny, train_step, batch):
  """State before, state after, and metrics of one step."""
  before = host(tiny.state())
  state, metrics = train_step(tiny.state(), batch)
  return before, host(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def dense(tiny, batch):
  """Loss, gradients and load, with the tables differentiated as a whole."""
  setup = tiny.setup
  state = tiny.state()
  canonical = setup.memory.compression(batch["inputs"])
  row_ids = setup.memory.hashing.hash(canonical, breaks=batch["breaks"])

  def loss_of(params, tables, balance):
    rows = {i: tables[i][ids] for i, ids in row_ids.items()}
    model = nnx.merge(setup.graphdef, params, balance)
    out = model(batch["inputs"], rows, breaks=batch["breaks"])
    log_p = jax.nn.log_softmax(out.logits)
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)
    mask = batch["loss_mask"]
    loss = -jnp.sum(picked[..., 0] * mask) / jnp.sum(mask)
    return loss + out.moe.balance_loss[0], (loss, out.moe.load[0])

  gradient = jax.jit(jax.grad(loss_of, argnums=(0, 1, 2), has_aux=True))
  gradients, (loss, load) = gradient(state.params, state.tables, state.balance)
  touched = {i: np.unique(np.asarray(ids)) for i, ids in row_ids.items()}
  return gradients, float(loss), np.asarray(load), touched


# --- what a step does ---


def test_a_step_is_the_dense_step(tiny, stepped, dense):
  before, after, metrics = stepped
  (by_params, by_tables, _), loss, _, touched = dense
  train = tiny.setup.train
  norm = float(optax.global_norm((by_params, by_tables)))
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
  assert norm > train.clip_norm, "the clip must be seen to work"

  # Dense Adam by optax, at the first step's rate: half of the peak.
  rate = train.learning_rate / 2
  np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)
  clip = min(1.0, train.clip_norm / norm)
  state = tiny.state()
  adam = {"b1": train.adam_b1, "b2": train.adam_b2, "eps": train.adam_eps}
  optimizers = {
    "params": (optax.adamw(rate, weight_decay=0.0, **adam), state.params),
    "tables": (
      optax.adam(rate * train.table_learning_rate_multiplier, **adam),
      state.tables,
    ),
  }
  gradients = {"params": by_params, "tables": by_tables}
  for part, (optimizer, values) in optimizers.items():
    clipped = jax.tree.map(lambda g: g * clip, gradients[part])
    start = jax.jit(optimizer.init)(values)
    updates, _ = jax.jit(optimizer.update)(clipped, start, values)
    sizes = flatten(clipped)
    for name, update in flatten(updates).items():
      path = f"{part}/{name}"
      expected = before[path] + np.asarray(update)
      if part == "params" and not name.endswith(("scale", "bias")):
        expected = expected - rate * train.weight_decay * before[path]
      # Adam divides a gradient by its own size, so that one near 0 turns its
      # rounding errors into a whole step: only above that can be compared.
      clear = np.abs(sizes[name]) > 1e-5
      assert clear.any(), path
      np.testing.assert_allclose(
        after[path][clear], expected[clear], rtol=1e-5, atol=2e-5, err_msg=path
      )
  table, was = after["tables/0"], before["tables/0"]
  untouched = np.setdiff1d(np.arange(len(was)), touched[0])
  assert len(untouched) > 10 and len(touched[0]) > 10
  assert table[untouched].tobytes() == was[untouched].tobytes()
  assert (table[touched[0]] != was[touched[0]]).any(axis=1).all()
  assert metrics["rows_touched/0"] == len(touched[0])


def test_moments_are_those_of_the_clipped_gradient(tiny, stepped, dense):
  _, after, metrics = stepped
  (by_params, by_tables, _), _, _, _ = dense
  train = tiny.setup.train
  clip = train.clip_norm / metrics["grad_norm"]
  # The rows take part in the norm: without them it would be another one.
  alone = float(optax.global_norm(by_params))
  assert abs(alone - metrics["grad_norm"]) > 1e-3 * alone
  means = {f"opt_state/0/mu/{n}": g for n, g in flatten(by_params).items()} | {
    "table_states/0/mu": by_tables[0]
  }
  for name, gradient in means.items():
    expected = (1 - train.adam_b1) * clip * np.asarray(gradient)
    np.testing.assert_allclose(
      after[name], expected, rtol=2e-3, atol=1e-7, err_msg=name
    )


def test_counts_advance(stepped):
  _, after, metrics = stepped
  for name in ("step", "opt_state/0/count", "table_states/0/count"):
    assert after[name] == 1, name
  assert metrics["finite"] and metrics["dropped"] == 0
  assert metrics["gate_mean/0"].shape == (1,)
  assert 0 < metrics["gate_mean/0"] < 1


def test_balancing_moves_toward_idle_experts_alone(tiny, stepped, dense):
  before, after, metrics = stepped
  (_, _, by_balance), _, load, _ = dense
  name = "balance/moe_blocks/ffn/bias"
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(by_balance))
  (moved,) = after[name] - before[name]
  rate = tiny.setup.model.moe.balance_rate
  np.testing.assert_allclose(moved, rate * np.sign(load.mean() - load))
  assert moved.any() and load.sum() == 4 * 12 * 2
  np.testing.assert_array_equal(
    moved, updated_bias(jnp.zeros(4), jnp.asarray(load), rate=rate)
  )
  np.testing.assert_allclose(
    metrics["max_violation"], [load.max() / load.mean() - 1], rtol=1e-6
  )
  # No optimizer knows of it: no moments, hence no decay.
  assert not any(
    "bias" in n
    for n in after
    if n.startswith("opt_state/0/mu/moe_b") and "/ffn/" in n
  )


def test_only_matrices_decay(tiny, train_step, batch):
  # Without targets there is no gradient but that of the balance loss, which
  # stops at the router's inputs; what has none moves by decay alone.
  quiet = batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"])}
  before = tiny.state()
  # Gains and biases of 1 would show any decay.
  before = with_leaf(before, "params/engrams/0/projection_bias", jnp.ones_like)
  was = host(before)
  state, metrics = train_step(before, quiet)
  now, train = host(state), tiny.setup.train
  assert metrics["loss"] == 0 and metrics["finite"]
  rate = float(metrics["learning_rate"])
  # Above the router there is no gradient at all.
  for name in ("ffn/down", "ffn/shared/up"):
    path = f"params/moe_blocks/{name}"
    np.testing.assert_allclose(
      now[path], was[path] * (1 - rate * train.weight_decay), rtol=1e-6
    )
  assert (
    now["params/norm/scale"].tobytes() == was["params/norm/scale"].tobytes()
  )
  # Where a gradient comes through, it is Adam alone: no move beyond its rate.
  path = "params/engrams/0/projection_bias"
  assert (np.abs(now[path] - was[path]) <= 1.001 * rate).all()


def test_the_loss_counts_masked_targets_out(tiny, train_step, batch):
  targets = batch["targets"]
  wrong = jnp.where(batch["loss_mask"], targets, (targets + 7) % 60)
  assert (wrong != targets).any()
  one, first = train_step(tiny.state(), batch)
  other, second = train_step(tiny.state(), batch | {"targets": wrong})
  assert first["loss"] == second["loss"]
  assert same_bits(host(one), host(other)) == []
  seen = jnp.where(batch["loss_mask"], (targets + 7) % 60, targets)
  _, third = train_step(tiny.state(), batch | {"targets": seen})
  assert third["loss"] != first["loss"]


# --- what a step must not do ---


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("params/moe_blocks/attention/query", jnp.nan),
    ("params/embedding/table", jnp.inf),
    ("tables/0", jnp.nan),
    # The loss is finite, the squares of the gradients are not.
    ("params/norm/scale", 1e25),
  ],
)
def test_a_step_that_is_not_finite_changes_nothing(
  tiny, train_step, batch, name, value
):
  state, _ = train_step(tiny.state(), batch)  # moments other than 0
  state = with_leaf(state, name, lambda x: jnp.full_like(x, value))
  before = host(state)
  state, metrics = train_step(state, batch)
  assert not metrics["finite"]
  assert not jnp.isfinite(metrics["grad_norm"])
  assert jnp.isfinite(metrics["loss"]) == (value == 1e25)
  after = host(state)
  assert after["step"] == before["step"] + 1
  assert same_bits(before, after) == ["step"]


def test_a_run_goes_on_after_a_step_that_is_not_finite(tiny, train_step, batch):
  state = tiny.state()
  broken = with_leaf(tiny.state(), "tables/0", lambda x: x * jnp.nan)
  broken, _ = train_step(broken, batch)
  # The tables mended: as if that step had not been, but for the rate.
  mended = dataclasses.replace(broken, tables=tiny.state().tables)
  mended, metrics = train_step(mended, batch)
  assert metrics["finite"] and int(mended.step) == 2
  state = dataclasses.replace(state, step=jnp.ones((), jnp.int32))
  state, _ = train_step(state, batch)
  assert same_bits(host(state), host(mended)) == []


def test_tables_are_written_in_place(tiny, train_step, batch):
  state = tiny.state()

  def places(state):
    arrays = (state.tables[0], *state.table_states[0][1:3])
    return [array.unsafe_buffer_pointer() for array in arrays]

  before = places(state)
  for _ in range(3):
    state, _ = train_step(state, batch)
    assert places(state) == before
  # A step that is skipped hands them on as well.
  state = with_leaf(state, "params/norm/scale", lambda x: x * jnp.nan)
  state, metrics = train_step(state, batch)
  assert not metrics["finite"] and places(state) == before


@pytest.fixture(scope="module")
def memory_of(make_tiny, make_batch):
  """Bytes of the compiled step for tables of about so many rows."""

  def measure(rows):
    memory = make_tiny().setup.model.engram
    memory = dataclasses.replace(
      memory, rows_per_head=(rows // 2, rows // 2), short_conv=False
    )
    # The less there is, the sooner it is compiled.
    tiny = make_tiny(model={"engram": memory, "moe": None})
    step = make_train_step(tiny.setup)
    compiled = step.lower(tiny.abstract_state(), make_batch()).compile()
    return compiled.memory_analysis()

  return measure


def test_memory_does_not_grow_with_the_rows(memory_of):
  small, large = memory_of(10_000), memory_of(1_000_000)
  # The tables are there, and are the same buffers before and after.
  table = 1_000_000 * 4 * 4
  assert large.argument_size_in_bytes > 3 * table
  assert large.alias_size_in_bytes > 3 * table
  assert large.temp_size_in_bytes < 0.2 * table
  growth = large.temp_size_in_bytes / small.temp_size_in_bytes
  assert 0.99 < growth < 1.01, growth


# --- other setups ---


def test_accumulation_changes_nothing_but_rounding(
  make_tiny, tiny, stepped, batch
):
  # As the state has no gradient near 0 of which Adam would make a step of
  # rounding errors, moments are compared, and what moved by them.
  _, once, metrics = stepped
  halves = make_tiny(accumulation=2)
  state, its = make_train_step(halves.setup)(tiny.state(), batch)
  twice = host(state)
  for name in ("loss", "grad_norm", "balance_loss", "gate_mean/0"):
    np.testing.assert_allclose(its[name], metrics[name], rtol=1e-5)
  for name in ("rows_touched/0", "max_violation", "learning_rate"):
    np.testing.assert_array_equal(its[name], metrics[name])
  for name, expected in once.items():
    if name.startswith(("opt_state/0/nu", "table_states/0/nu")):
      # Squares of gradients: far below what float32 resolves near 1.
      np.testing.assert_allclose(
        np.sqrt(twice[name]), np.sqrt(expected), rtol=1e-3, atol=1e-6
      )
    elif name.startswith(("opt_state/0/mu", "table_states/0/mu")):
      np.testing.assert_allclose(twice[name], expected, rtol=1e-3, atol=1e-7)
    elif name.startswith(("params/", "tables/")):
      close = np.isclose(twice[name], expected, rtol=1e-4, atol=1e-5)
      mean = once.get(name.replace("params/", "opt_state/0/mu/"))
      mean = once["table_states/0/mu"] if mean is None else mean
      assert (close | (np.abs(mean) < 1e-6)).all(), name
    else:
      np.testing.assert_array_equal(twice[name], expected, err_msg=name)


def test_a_model_without_memory_trains(make_tiny, batch):
  # Half of the mean load fits: at least half of 4 * 12 * 2 falls out.
  experts = make_tiny().setup.model.moe
  tight = dataclasses.replace(experts, dispatch="bucketed", capacity_factor=0.5)
  plain = make_tiny(memory=False, model={"moe": tight}, accumulation=2)
  step = make_train_step(plain.setup)
  state, losses = plain.state(), []
  for _ in range(8):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
    assert 48 <= metrics["dropped"] < 96
  assert losses[-1] < losses[0] and int(state.step) == 8
  assert state.tables == {} and state.table_states == {}
  assert not any("gate_mean" in name or "rows" in name for name in metrics)


def test_training_learns(tiny, train_step, make_batch):
  state, batch, losses = tiny.state(), make_batch(1), []
  for _ in range(15):
    state, metrics = train_step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.7 * losses[0], losses
