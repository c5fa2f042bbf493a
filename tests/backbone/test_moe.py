"""Experts: three dispatches against each other, routing against NumPy."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone import dispatch, routing
from engram_jax.backbone.moe import BalancingBias, MoE
from engram_jax.config import MoEConfig
from engram_jax.errors import InputError

WIDTH, EXPERTS, TOP_K, FFN = 8, 5, 2, 6
FORMS = ("dense", "bucketed", "dropless")


dense = jax.jit(dispatch.dispatch_dense)
bucketed = jax.jit(dispatch.dispatch_bucketed, static_argnames="capacity")
route = jax.jit(routing.route, static_argnames="top_k")


def normal(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def make(dtype="float32", **fields):
  config = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "expert_size": FFN,
    "capacity_factor": 100.0,
  }
  config = MoEConfig(**(config | fields))
  return MoE(WIDTH, config, init_std=0.5, dtype=dtype, rngs=nnx.Rngs(0))


def experts(seed=20):
  return (
    normal(seed, EXPERTS, WIDTH, FFN),
    normal(seed + 1, EXPERTS, WIDTH, FFN),
    normal(seed + 2, EXPERTS, FFN, WIDTH),
  )


def numpy_experts(x, ids, weights, gate, up, down, *, capacity=None):
  """One assignment at a time; an expert that is full drops it."""
  x, weights, gate, up, down = (
    np.asarray(a, np.float64) for a in (x, weights, gate, up, down)
  )
  y, load, dropped = np.zeros_like(x), np.zeros(len(gate), int), 0
  for t, row in enumerate(np.asarray(ids)):
    for j, e in enumerate(row):
      load[e] += 1
      if capacity is not None and load[e] > capacity:
        dropped += 1
        continue
      a = x[t] @ gate[e]
      y[t] += weights[t, j] * (
        (a / (1 + np.exp(-a)) * (x[t] @ up[e])) @ down[e]
      )
  return y, load, dropped


def choose(seed, tokens, top_k=TOP_K):
  """Random expert ids, different within a token, and weights of sum 1."""
  scores = normal(seed, tokens, EXPERTS)
  ids = jax.lax.top_k(scores, top_k)[1]
  return ids, jax.nn.softmax(normal(seed + 1, tokens, top_k))


def test_layer_equals_the_equations_in_float64():
  layer = make(num_shared=2)
  layer.bias[...] = 0.3 * normal(3, EXPERTS)
  x = normal(4, 2, 6, WIDTH)
  run = jax.jit(lambda layer, x: layer(x, dispatch="dense"))
  y, metrics = run(layer, x)

  tokens = np.asarray(x, np.float64).reshape(-1, WIDTH)
  logits = tokens @ np.asarray(layer.router[...], np.float64)
  affinity = 1 / (1 + np.exp(-logits))
  biased = affinity + np.asarray(layer.bias[...], np.float64)
  ids = np.argsort(-biased, axis=1)[:, :TOP_K]
  weights = np.take_along_axis(affinity, ids, axis=1)
  weights /= weights.sum(axis=1, keepdims=True)
  stacks = (layer.gate[...], layer.up[...], layer.down[...])
  expected, load, _ = numpy_experts(tokens, ids, weights, *stacks)
  shared = layer.shared
  assert shared.gate.shape == (WIDTH, 2 * FFN)
  one = lambda w: np.asarray(w[...], np.float64)[None]
  expected += numpy_experts(
    tokens,
    np.zeros((12, 1), int),
    np.ones((12, 1)),
    *map(one, (shared.gate, shared.up, shared.down)),
  )[0]
  np.testing.assert_allclose(
    y.reshape(-1, WIDTH), expected, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(metrics.load, load)
  assert metrics.dropped == 0

  # The balance loss, one sequence at a time (V3 Eq. 17-20).
  losses = []
  for rows in (slice(0, 6), slice(6, 12)):
    counts = np.bincount(ids[rows].ravel(), minlength=EXPERTS)
    share = affinity[rows] / affinity[rows].sum(axis=1, keepdims=True)
    f = EXPERTS / (TOP_K * 6) * counts
    losses.append(np.sum(f * share.mean(axis=0)))
  np.testing.assert_allclose(
    metrics.balance_loss, 1e-4 * np.mean(losses), rtol=1e-5
  )


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_dropless_equals_the_oracle(tokens):
  """Balanced, and all on one pair of experts while the others have none."""
  layer = make()
  stacks = [w[...] for w in (layer.gate, layer.up, layer.down)]
  x, (ids, weights) = normal(8, tokens, WIDTH), choose(9, tokens)
  for chosen in (ids, jnp.zeros_like(ids) + jnp.arange(TOP_K)):

    def total(form, x, weights, *stacks, chosen=chosen):
      return jnp.sum(jnp.sin(form(x, chosen, weights, *stacks)))

    chex.assert_trees_all_close(
      *(
        jax.jit(jax.value_and_grad(functools.partial(total, form), range(5)))(
          x, weights, *stacks
        )
        for form in (dispatch.dispatch_dropless, dispatch.dispatch_dense)
      ),
      rtol=1e-4,
      atol=1e-5,
    )


@pytest.mark.parametrize("load", [[3, 3, 3, 3, 3], [0, 9, 0, 1, 0], [1] * 5])
@pytest.mark.parametrize(
  "form", [dispatch.blocked_experts, dispatch.ragged_experts]
)
def test_experts_on_sorted_rows_equal_the_oracle(form, load):
  """Both platforms' forms, in values and all gradients."""
  layer = make()
  stacks = [w[...] for w in (layer.gate, layer.up, layer.down)]
  rows = normal(8, sum(load), WIDTH)
  owner = jnp.repeat(jnp.arange(EXPERTS), jnp.array(load))[:, None]

  def plain(rows, *stacks):
    ones = jnp.ones(owner.shape)
    return dispatch.dispatch_dense(rows, owner, ones, *stacks)

  def sorted_rows(rows, *stacks):
    return form(rows, jnp.array(load), *stacks)

  def value_and_gradients(function):
    total = lambda *x: jnp.sum(jnp.sin(function(*x)))
    return jax.jit(jax.value_and_grad(total, range(4)))(rows, *stacks)

  chex.assert_trees_all_close(
    *map(value_and_gradients, (sorted_rows, plain)), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  ("assignments", "experts", "size"),
  [(16, 64, 1), (4096, 64, 32), (4096, 8, 64), (12, 2, 2)],
)
def test_block_size(assignments, experts, size):
  assert dispatch.block_size(assignments, experts) == size


@pytest.mark.parametrize("num_shared", [0, 1])
def test_dispatches_are_equal_in_values_and_all_gradients(num_shared):
  layer = make(num_shared=num_shared)
  assert (layer.shared is None) == (num_shared == 0)
  x = normal(5, 2, 7, WIDTH)

  def run(form):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(layer, x):
      y, metrics = layer(x, dispatch=form)
      return jnp.sum(jnp.sin(y)) + metrics.balance_loss, (y, metrics)

    return loss(layer, x)

  plain = run("dense")
  # The bias is no parameter: its gradient, when asked for, is exactly 0.
  assert not plain[1][0].bias[...].any()
  assert np.abs(plain[1][0].router[...]).max() > 1e-3
  for form in ("bucketed", "dropless"):
    for a, b in zip(*map(jax.tree.leaves, (plain, run(form)))):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_experts_that_are_elsewhere_count_for_nothing():
  x, (ids, weights), stacks = normal(5, 9, WIDTH), choose(6, 9), experts()
  whole = dense(x, ids, weights, *stacks)
  run = jax.jit(dispatch.dispatch_dense, static_argnames="dtype")
  parts = [
    run(
      x.astype(jnp.bfloat16),
      ids - first,
      weights,
      *(w[first:end].astype(jnp.bfloat16) for w in stacks),
      dtype=jnp.float32,
    )
    for first, end in ((0, 2), (2, EXPERTS))
  ]
  assert parts[0].dtype == jnp.float32
  error = np.abs(parts[0] + parts[1] - whole).max() / np.abs(whole).max()
  assert error < 0.03
  halves = [
    dense(x, ids - first, weights, *(w[first:end] for w in stacks))
    for first, end in ((0, 2), (2, EXPERTS))
  ]
  np.testing.assert_allclose(sum(halves), whole, rtol=1e-4, atol=1e-4)


def test_buckets_hold_the_first_tokens_of_each_expert():
  x, (ids, weights) = normal(5, 9, WIDTH), choose(6, 9)
  buckets, slots = dispatch.to_buckets(x, ids, num_experts=EXPERTS, capacity=3)
  expected, filled = np.zeros((EXPERTS, 3, WIDTH)), np.zeros(EXPERTS, int)
  for t, j in np.ndindex(*ids.shape):
    e = int(ids[t, j])
    assert slots[t, j] == filled[e]
    if filled[e] < 3:
      expected[e, filled[e]] = x[t]
    filled[e] += 1
  np.testing.assert_array_equal(buckets, expected)
  # Experts that return what they get give each token back, weighted.
  y, dropped = dispatch.from_buckets(buckets, ids, slots, weights)
  kept = np.sum(np.where(slots < 3, weights, 0), axis=1)
  np.testing.assert_allclose(y, kept[:, None] * x, rtol=1e-5, atol=1e-6)
  assert dropped == np.maximum(filled - 3, 0).sum() > 0


@pytest.mark.parametrize("capacity", [1, 2, 5, 13])
def test_drops_are_counted_exactly(capacity):
  x, (ids, weights) = normal(6, 13, WIDTH), choose(7, 13)
  arguments = (x, ids, weights, *experts())
  y, dropped = bucketed(*arguments, capacity=capacity)
  expected, _, count = numpy_experts(*arguments, capacity=capacity)
  assert dropped == count and (count > 0) == (capacity < 13)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_gradients_with_drops_equal_those_of_the_kept_assignments():
  x, (ids, weights) = normal(8, 13, WIDTH), choose(9, 13)
  order = np.zeros(EXPERTS, int)
  kept = np.zeros(ids.shape, bool)
  for place in np.ndindex(*ids.shape):
    e = int(ids[place])
    kept[place] = order[e] < 3
    order[e] += 1

  def dropping(x, weights, *stacks):
    y, _ = dispatch.dispatch_bucketed(x, ids, weights, *stacks, capacity=3)
    return jnp.sum(jnp.sin(y))

  def plain(x, weights, *stacks):
    weights = jnp.where(kept, weights, 0)
    return jnp.sum(jnp.sin(dispatch.dispatch_dense(x, ids, weights, *stacks)))

  arguments = (x, weights, *experts())
  where = tuple(range(5))
  grads = [jax.jit(jax.grad(f, where))(*arguments) for f in (dropping, plain)]
  for a, b in zip(*grads):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_capacity_of_the_mean_load_drops_the_later_tokens():
  tokens = 10
  ids = jnp.broadcast_to(jnp.array([1, 3]), (tokens, 2))
  weights = jnp.full((tokens, 2), 0.5)
  x = normal(10, tokens, WIDTH)
  capacity = dispatch.bucket_capacity(
    tokens, num_experts=EXPERTS, top_k=TOP_K, factor=1.0
  )
  assert capacity == 4
  arguments = (x, ids, weights, *experts())
  y, dropped = bucketed(*arguments, capacity=capacity)
  assert dropped == 2 * (tokens - 4)
  full = dense(*arguments)
  np.testing.assert_allclose(y[:4], full[:4], rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(y[4:], 0.0)


def test_no_token_changes_an_earlier_one_when_buckets_are_full():
  layer = make(capacity_factor=0.6)
  x = normal(11, 1, 12, WIDTH)
  run = jax.jit(lambda x: layer(x, dispatch="bucketed"))
  (before, metrics), (after, _) = run(x), run(x.at[0, 7:].add(3.0))
  assert metrics.dropped > 0
  np.testing.assert_array_equal(before[:, :7], after[:, :7])


@pytest.mark.parametrize("form", ["dense", "dropless"])
def test_a_dense_token_depends_on_itself_alone(form):
  layer = make()
  x = normal(12, 2, 6, WIDTH)
  run = jax.jit(lambda x: layer(x, dispatch=form)[0])
  before, after = run(x), run(x.at[0, 2].add(5.0))
  changed = np.zeros((2, 6), bool)
  changed[0, 2] = True
  # `ragged_dot` may sum in another order when the groups move.
  tolerance = 0 if form == "dense" else 1e-5
  np.testing.assert_allclose(
    before[~changed], after[~changed], rtol=tolerance, atol=tolerance
  )
  assert np.abs(before[changed] - after[changed]).max() > 1e-2


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 50.0])
def test_bucket_capacity(factor):
  found = dispatch.bucket_capacity(21, num_experts=4, top_k=2, factor=factor)
  assert found == min(21, math.ceil(21 * 2 / 4 * factor))


def test_the_bias_chooses_but_does_not_weigh():
  x, router = normal(13, 9, WIDTH), normal(14, WIDTH, EXPERTS)
  bias = jnp.array([9.0, 0.0, 0.0, 0.0, 7.0])
  ids, weights, affinities = route(x, router, bias, top_k=2)
  np.testing.assert_array_equal(ids, np.broadcast_to([0, 4], (9, 2)))
  pair = np.asarray(affinities)[:, [0, 4]]
  np.testing.assert_allclose(
    weights, pair / pair.sum(axis=1, keepdims=True), rtol=1e-6
  )
  np.testing.assert_allclose(affinities, jax.nn.sigmoid(x @ router), rtol=1e-4)

  def second_moment(bias, router):
    _, weights, affinities = routing.route(x, router, bias, top_k=2)
    return jnp.sum(weights**2) + jnp.sum(affinities**2)

  grad = jax.jit(jax.grad(second_moment, (0, 1)))
  by_bias, by_router = grad(bias, router)
  assert not by_bias.any() and np.abs(by_router).max() > 1e-3


def test_updated_bias_and_max_violation():
  load = jnp.array([[4.0, 0.0, 2.0], [2.0, 2.0, 2.0]])
  bias = routing.updated_bias(jnp.ones((2, 3)), load, rate=0.25)
  np.testing.assert_allclose(bias, [[0.75, 1.25, 1.0], [1.0, 1.0, 1.0]])
  np.testing.assert_allclose(routing.max_violation(load), [1.0, 0.0])


def test_repeated_updates_balance_a_skewed_router():
  layer = make()
  # Every token has a large first feature, which two experts' routers like.
  x = normal(15, 8, 64, WIDTH).at[..., 0].set(3.0)
  layer.router[...] = (
    layer.router[...].at[0].set(jnp.array([0.8, 0.6, 0.0, -0.2, -0.6]))
  )

  @jax.jit
  def load(bias):
    ids, _, _ = routing.route(
      x.reshape(-1, WIDTH), layer.router[...], bias, top_k=TOP_K
    )
    return routing.expert_load(ids, EXPERTS).astype(jnp.float32)

  bias = layer.bias[...]
  first = float(routing.max_violation(load(bias)))
  for _ in range(100):
    bias = routing.updated_bias(bias, load(bias), rate=0.01)
  last = float(routing.max_violation(load(bias)))
  assert first > 0.7 and last < 0.1


def test_balance_loss_of_balanced_routing_is_its_weight():
  affinities = jnp.full((3, EXPERTS, EXPERTS), 0.4)
  ids = (jnp.arange(EXPERTS)[:, None] + jnp.arange(2)) % EXPERTS
  ids = jnp.broadcast_to(ids, (3, EXPERTS, 2))
  loss = routing.balance_loss(affinities, ids, weight=0.5)
  np.testing.assert_allclose(loss, 0.5, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_float32_parameters(form):
  layer = make("bfloat16", dispatch=form)
  x = normal(16, 2, 5, WIDTH)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(layer):
    y, metrics = layer(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in metrics} == {jnp.dtype("float32")}
    return jnp.sum(y.astype(jnp.float32) ** 2), y

  (_, y), grads = loss(layer)
  for tree in (layer, grads):
    for leaf in jax.tree.leaves(tree):
      assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
  wide, _ = jax.jit(lambda layer, x: layer(x))(
    make(), x.astype(jnp.bfloat16).astype(jnp.float32)
  )
  error = np.abs(np.float32(y) - wide).max() / np.abs(wide).max()
  assert error < 0.03


def test_the_bias_is_a_variable_of_its_own():
  layer = make()
  assert isinstance(layer.bias, BalancingBias)
  assert not isinstance(layer.bias, nnx.Param)
  _, params, rest = nnx.split(layer, nnx.Param, ...)
  assert "bias" not in params and set(rest) == {"bias"}
  assert layer.bias[...].dtype == jnp.float32


def test_bad_arguments_are_refused():
  layer = make()
  x = normal(17, 1, 3, WIDTH)
  with pytest.raises(InputError, match="dispatch: sparse; valid: one of"):
    layer(x, dispatch="sparse")
  with pytest.raises(
    InputError, match=r"x.shape: \(1, 3, 4\); valid: \[..., 8\]"
  ):
    layer(x[..., :4])
  with pytest.raises(InputError, match="dtype: float16"):
    make("float16")
  with pytest.raises(InputError, match="top_k: 6; valid: 1 to 5"):
    routing.route(x[0], layer.router[...], layer.bias[...], top_k=6)
  with pytest.raises(InputError, match="capacity: 0; valid: 1 or more"):
    ids, weights = choose(18, 3)
    dispatch.dispatch_bucketed(x[0], ids, weights, *experts(), capacity=0)
  with pytest.raises(InputError, match="capacity_factor: 0"):
    dispatch.bucket_capacity(3, num_experts=5, top_k=2, factor=0.0)
  with pytest.raises(InputError, match="rate: -1"):
    routing.updated_bias(jnp.zeros(2), jnp.ones(2), rate=-1.0)
