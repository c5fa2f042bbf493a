"""Engram against DeepSeek's demo, in pieces, in both Flax flavours."""

import json
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

from engram_jax import sharding
from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.fusion import linen
from engram_jax.fusion.engram import (
  Engram,
  EngramParams,
  fuse,
  init_conv_state,
)
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.table import lookup
from engram_jax.types import Break

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "module.npz")
CASES = {c["name"]: c for c in json.loads(str(GOLDEN["settings_json"]))}


def config(**changes) -> EngramConfig:
  settings = dict(
    hidden_size=12,
    layers=(1,),
    rows_per_head=(31, 37),
    heads=2,
    head_dim=5,
    streams=2,
    pad_id=0,
  )
  return EngramConfig(**{**settings, **changes})


def inputs(config, length=17, seed=0):
  a, b = jax.random.split(jax.random.key(seed))
  hidden = (2, length, config.streams, config.hidden_size)
  rows = (2, length, config.columns, config.head_dim)
  return jax.random.normal(a, hidden), jax.random.normal(b, rows)


def trained(config, seed=1) -> Engram:
  """A module whose parameters are all away from 0, convolution included."""
  engram = Engram(config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(engram)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  moved = [
    x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)
  ]
  return nnx.merge(graph, jax.tree.unflatten(tree, moved))


# --- DeepSeek's numbers ---


def demo_params(weights, case) -> EngramParams:
  """The demo's (out, in) weights in our layout."""
  streams, size, taps = (
    case["hc_mult"],
    case["hidden_size"],
    case["kernel_size"],
  )
  conv = weights["conv_weight"].reshape(streams, size, taps)

  def with_value(name):
    return jnp.concatenate(
      [weights[f"key_{name}"], weights[f"value_{name}"][None]]
    )

  return EngramParams(
    projection=with_value("weight").transpose(2, 0, 1),
    key_scale=weights["key_norm"],
    query_scale=weights["query_norm"],
    projection_bias=with_value("bias"),
    conv_scale=weights["conv_norm"],
    conv_kernel=conv.transpose(2, 0, 1),
  )


@pytest.mark.parametrize("name", CASES)
def test_golden_output_and_every_gradient(name):
  case = CASES[name]
  start = f"{name}/weight/"
  weights = {
    key[len(start) :]: jnp.asarray(GOLDEN[key])
    for key in GOLDEN.files
    if key.startswith(start)
  }
  hashing = NgramHash.create(
    vocab_size=case["vocab_size"],
    rows_per_head=[case["min_rows_per_order"]] * (case["max_ngram"] - 1),
    heads=case["heads_per_order"],
    layers=case["layer_ids"],
    pad_id=case["pad_id"],
    seed=case["seed"],
  )
  token_ids = jnp.asarray(GOLDEN[f"{name}/token_ids"])
  row_ids = hashing.row_ids(token_ids, case["layer_id"])

  def weighted_output(weights, hidden):
    update = fuse(
      demo_params(weights, case),
      hidden,
      lookup(weights["table"], row_ids),
      dilation=case["dilation"],
      query_eps=case["query_norm_eps"],
      key_eps=case["key_norm_eps"],
      conv_eps=case["conv_norm_eps"],
    ).update
    return jnp.sum(update * GOLDEN[f"{name}/cotangent"]), update

  hidden = jnp.asarray(GOLDEN[f"{name}/hidden_states"])
  grad = jax.grad(weighted_output, argnums=(0, 1), has_aux=True)
  (by_weight, by_hidden), update = jax.jit(grad)(weights, hidden)

  # No further from the float64 reference than DeepSeek's own float32 run.
  error = abs(update - GOLDEN[f"{name}/output_float64"]).max()
  assert error <= 1.5 * case["float32_error"]
  for key, found in {**by_weight, "hidden_states": by_hidden}.items():
    expected = GOLDEN[f"{name}/grad/{key}"]
    assert found.shape == expected.shape
    # Relative to the largest entry: where a score is near 0, the root's steep
    # slope magnifies float32 rounding in both implementations. The demo's own
    # gradients are 7e-5 from those of float64, ours 2e-5.
    scale = abs(expected).max()
    np.testing.assert_allclose(
      found, expected, rtol=0, atol=1e-4 * scale, err_msg=key
    )


# --- the module ---


OPTIONS = {
  "as the paper": {},
  "one stream": {"streams": 1},
  "biases": {"projection_bias": True},
  "no convolution": {"short_conv": False},
  "no root": {"signed_sqrt": False},
  "no gate": {"gate": False},
  "no gate, no convolution": {"gate": False, "short_conv": False},
  "one key": {"per_stream_keys": False, "projection_bias": True},
  "other taps": {"conv_kernel_size": 3, "conv_dilation": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_by_step_equals_the_whole_sequence(options):
  settings = config(**options)
  engram, (hidden, rows) = trained(settings), inputs(settings)
  whole, final = engram(hidden, rows)
  assert whole.shape == hidden.shape
  state, steps = init_conv_state(settings, 2), []
  for t in range(hidden.shape[1]):
    update, state = engram(
      hidden[:, t : t + 1], rows[:, t : t + 1], state=state
    )
    steps.append(update)
  np.testing.assert_allclose(
    jnp.concatenate(steps, 1), whole, rtol=1e-5, atol=1e-6
  )
  if settings.short_conv:
    np.testing.assert_allclose(state, final, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_linen_equals_nnx_on_shared_weights(options):
  settings = config(**options)
  engram, (hidden, rows) = trained(settings), inputs(settings)
  module = linen.Engram(settings)
  variables = nn.unbox(module.init(jax.random.key(0), hidden, rows))
  shared = engram.params()._asdict()
  shared = {name: x for name, x in shared.items() if x is not None}
  shapes = lambda tree: {name: x.shape for name, x in tree.items()}
  assert shapes(variables["params"]) == shapes(shared)

  def by_linen(params, hidden, rows):
    return module.apply({"params": params}, hidden, rows)[0].sum()

  def by_nnx(engram, hidden, rows):
    return engram(hidden, rows)[0].sum()

  theirs = jax.grad(by_linen, argnums=(0, 1, 2))(shared, hidden, rows)
  ours = jax.grad(by_nnx, argnums=(0, 1, 2))(engram, hidden, rows)
  np.testing.assert_array_equal(
    by_linen(shared, hidden, rows), by_nnx(engram, hidden, rows)
  )
  for name, gradient in theirs[0].items():
    np.testing.assert_array_equal(gradient, getattr(ours[0].params(), name))
  for gradient, expected in zip(ours[1:], theirs[1:]):
    np.testing.assert_array_equal(gradient, expected)


def test_linen_s_parameters_name_their_axes_too():
  settings = config(projection_bias=True)
  module, (hidden, rows) = linen.Engram(settings), inputs(settings)
  variables = module.init(jax.random.key(0), hidden, rows)
  engram = nnx.eval_shape(lambda: Engram(settings, rngs=nnx.Rngs(0)))
  names = nn.get_partition_spec(variables)["params"]
  mesh, explicit = (
    jax.make_mesh((1, 1, 1, 1), sharding.AXES, axis_types=(kind,) * 4)
    for kind in (AxisType.Auto, AxisType.Explicit)
  )
  rules = list(sharding.LOGICAL_AXES.items())
  specs = nn.logical_to_mesh_sharding(names, mesh, rules)
  assert specs.keys() == set(nnx.to_pure_dict(nnx.state(engram)))
  for name, found in specs.items():
    parameter = getattr(engram, name)
    assert tuple(names[name]) == parameter.axes
    expected = sharding.parameter_spec(parameter.axes, parameter.shape, mesh)
    expected = jax.sharding.NamedSharding(mesh, expected)
    assert found.is_equivalent_to(expected, len(parameter.shape)), name
  # On a mesh, with rules or without, the same layer.
  expected, _ = module.apply(variables, hidden, rows)
  for on, by in ((mesh, rules), (mesh, []), (explicit, [])):
    with jax.set_mesh(on), nn.logical_axis_rules(by):
      found, _ = jax.jit(module.apply)(variables, hidden, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_starts_as_the_gated_value_alone():
  # The convolution starts at zero: Y is u, nothing else.
  settings = config()
  hidden, rows = inputs(settings)
  engram = Engram(settings, rngs=nnx.Rngs(0))
  fused = engram.fuse(hidden, rows)
  value = rows.reshape(2, 17, -1) @ engram.projection[:, -1]
  expected = fused.gates[..., None] * value[:, :, None]
  np.testing.assert_allclose(fused.update, expected, rtol=1e-6, atol=1e-6)
  assert fused.gates.min() > 0 and fused.gates.max() < 1


def test_without_a_gate_the_whole_value_is_added():
  settings = config(gate=False, short_conv=False)
  engram, (hidden, rows) = trained(settings), inputs(settings)
  breaks = jnp.zeros((2, 17), jnp.int8).at[:, 4].set(Break.NON_TEXT)
  fused = engram.fuse(hidden, rows, breaks=breaks)
  assert engram.projection.shape == (20, 1, 12)
  value = rows.reshape(2, 17, -1) @ engram.projection[:, 0]
  is_text = (breaks == 0)[..., None]
  np.testing.assert_array_equal(
    fused.gates, jnp.broadcast_to(is_text, fused.gates.shape)
  )
  expected = jnp.where(is_text, value, 0)[:, :, None]
  np.testing.assert_allclose(
    fused.update,
    jnp.broadcast_to(expected, hidden.shape),
    rtol=1e-5,
    atol=1e-6,
  )


def test_one_key_is_the_same_key_for_every_stream():
  shared = trained(config(per_stream_keys=False, projection_bias=True))
  assert shared.projection.shape == (20, 2, 12)
  hidden, rows = inputs(shared.config)
  one = shared.params()
  each = one._replace(
    projection=one.projection[:, jnp.array([0, 0, 1])],
    projection_bias=one.projection_bias[jnp.array([0, 0, 1])],
  )
  found = fuse(one, hidden, rows, dilation=3)
  expected = fuse(each, hidden, rows, dilation=3)
  np.testing.assert_allclose(found.gates, expected.gates, rtol=1e-5)
  np.testing.assert_allclose(found.update, expected.update, rtol=1e-4)
  assert (found.gates[:, :, 0] != found.gates[:, :, 1]).any()


def test_every_projection_starts_at_the_scale_of_the_rows():
  # Variance 1 / M, however many streams there are.
  settings = config(hidden_size=64, heads=16, head_dim=16, streams=3)
  projection = Engram(settings, rngs=nnx.Rngs(0)).projection[...]
  assert projection.shape == (512, 4, 64)
  np.testing.assert_allclose(projection.std(axis=(0, 2)), 512**-0.5, rtol=0.02)


def test_a_later_position_changes_nothing_before_it():
  settings = config()
  engram, (hidden, rows) = trained(settings), inputs(settings)
  before, _ = engram(hidden, rows)
  for changed in (
    engram(hidden.at[:, 9].add(1), rows)[0],
    engram(hidden, rows.at[:, 9].add(1))[0],
  ):
    np.testing.assert_array_equal(before[:, :9], changed[:, :9])
    assert (before[:, 9] != changed[:, 9]).any()


def test_documents_and_non_text():
  settings = config()
  engram, (hidden, rows) = trained(settings), inputs(settings)
  breaks = jnp.zeros((2, 17), jnp.int8).at[:, 6].set(Break.DOCUMENT_START)
  packed, _ = engram(hidden, rows, breaks=breaks)
  first, _ = engram(hidden[:, :6], rows[:, :6])
  second, _ = engram(hidden[:, 6:], rows[:, 6:])
  np.testing.assert_allclose(
    packed, jnp.concatenate([first, second], 1), rtol=1e-5, atol=1e-6
  )
  image = jnp.zeros((2, 17), jnp.int8).at[:, 4:7].set(Break.NON_TEXT)
  fused = engram.fuse(hidden, rows, breaks=image)
  assert not fused.update[:, 4:7].any() and not fused.gates[:, 4:7].any()
  assert fused.update[:, 7].all()


def test_bfloat16_compute_keeps_float32_parameters():
  settings = config(dtype="bfloat16")
  engram, (hidden, rows) = trained(settings), inputs(settings)
  params = nnx.state(engram)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  fused = engram.fuse(hidden, rows)
  assert fused.update.dtype == jnp.bfloat16 and fused.gates.dtype == jnp.float32
  exact = trained(config()).fuse(hidden, rows)
  np.testing.assert_allclose(fused.gates, exact.gates, atol=0.03)
  np.testing.assert_allclose(
    fused.update.astype(jnp.float32), exact.update, atol=0.12
  )
  gradient = jax.grad(lambda p: fuse(p, hidden, rows, dilation=3).update.sum())
  found = gradient(engram.params())
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_refuses_widths_that_do_not_fit():
  settings = config()
  hidden, rows = inputs(settings)
  engram = Engram(settings, rngs=nnx.Rngs(0))
  with pytest.raises(InputError, match=r"rows: \(2, 17, 3, 5\).*K \* d = 20"):
    engram(hidden, rows[:, :, :3])
  with pytest.raises(InputError, match=r"hidden: .*\[B, L, 2, 12\]"):
    engram(hidden[..., :11], rows)


def test_a_model_of_one_stream_needs_no_axis_for_it():
  engram = trained(config(streams=1))
  hidden, rows = inputs(engram.config)
  expected = engram.fuse(hidden, rows)
  found = engram.fuse(hidden[:, :, 0], rows)
  np.testing.assert_array_equal(found.update, expected.update[:, :, 0])
  np.testing.assert_array_equal(found.gates, expected.gates)
  variables = {"params": dict(nnx.to_pure_dict(nnx.state(engram)))}
  update, _ = linen.Engram(engram.config).apply(
    variables, hidden[:, :, 0], rows
  )
  np.testing.assert_array_equal(update, found.update)
  with pytest.raises(InputError, match=r"^hidden: .*; valid: shape \[B, L, 2"):
    trained(config())(hidden[:, :, 0], inputs(config())[1])


def test_rows_of_other_positions_are_refused(monkeypatch):
  engram = trained(config())
  hidden, rows = inputs(engram.config)
  # As for a user, without the annotations' own checks: these arrays broadcast.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  for wrong in (hidden[:1], hidden[:, :1]):
    with pytest.raises(
      InputError, match=r"^rows: .*; valid: shape \[\d+, \d+,"
    ):
      engram(wrong, rows)
