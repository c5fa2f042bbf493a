"""The whole model: causality, documents, memory on and off, sizes, dtypes.

That a step equals the whole sequence is tested in `tests/decoding`.
"""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.layer_groups import (
  LayerGroup,
  layer_groups,
  num_lower_blocks,
)
from engram_jax.backbone.transformer import (
  Context,
  Transformer,
  document_layout,
)
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.memory.memory import Memory
from engram_jax.types import Break

BATCH, LENGTH, VOCAB, WIDTH = 2, 10, 20, 32
ENGRAM = EngramConfig(
  hidden_size=WIDTH,
  layers=(2, 0),
  rows_per_head=(60, 70),
  heads=2,
  head_dim=4,
  pad_id=0,
  conv_kernel_size=3,
  conv_dilation=2,
)
CONFIG = ModelConfig(
  vocab_size=VOCAB,
  hidden_size=WIDTH,
  num_layers=3,
  attention=AttentionConfig(
    num_heads=2, nope_dim=8, rope_dim=4, value_dim=6, kv_rank=8
  ),
  dense_size=16,
  moe=MoEConfig(num_experts=4, top_k=2, expert_size=8, num_shared=1),
  engram=ENGRAM,
)
MEMORY = Memory.create(ENGRAM, vocab_size=VOCAB)


def shapes_of(config):
  """The model without values: its graph, and shapes for its arrays."""
  return jax.eval_shape(
    lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)))
  )


@functools.cache
def make(config=CONFIG):
  """A model with loud weights, the convolution's and the biases' too."""
  graph, shapes = shapes_of(config)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    value = 0.3 * rng.normal(size=leaf.shape) + ("scale" in str(path))
    return jnp.asarray(value, jnp.float32)

  return nnx.merge(graph, jax.tree.map_with_path(draw, shapes))


@pytest.fixture(scope="module")
def tables():
  rng = np.random.default_rng(1)
  return {
    layer: jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)
    for layer, rows in MEMORY.num_rows.items()
  }


@jax.jit
def forward(model, token_ids, rows, breaks=None):
  """Experts without drops: no token then depends on its neighbours'."""
  return model(token_ids, rows, breaks=breaks, dispatch="dense")


@jax.jit
def read(tables, token_ids, breaks=None):
  return MEMORY.lookup(tables, token_ids, breaks=breaks).rows


def tokens(seed=0):
  ids = np.random.default_rng(seed).integers(1, VOCAB, (BATCH, LENGTH))
  return jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def output(tables):
  return forward(make(), tokens(), read(tables, tokens()))


def test_shapes_and_dtypes(output):
  assert output.logits.shape == (BATCH, LENGTH, VOCAB)
  assert output.logits.dtype == jnp.float32
  assert set(output.gates) == {0, 2}
  for gates in output.gates.values():
    # The axis of the residual streams is there even for one.
    assert gates.shape == (BATCH, LENGTH, 1)
    assert ((gates > 0) & (gates < 1)).all()
  assert output.moe.load.shape == (2, CONFIG.moe.num_experts)
  assignments = BATCH * LENGTH * CONFIG.moe.top_k
  assert output.moe.load.sum(axis=1).tolist() == [assignments] * 2
  assert output.moe.dropped.tolist() == [0, 0]
  assert output.moe.balance_loss.shape == (2,)


@pytest.mark.parametrize("place", [0, 3, LENGTH - 1])
def test_a_token_changes_nothing_before_it(tables, output, place):
  ids = tokens()
  changed = ids.at[0, place].set(ids[0, place] % (VOCAB - 1) + 1)
  after = forward(make(), changed, read(tables, changed)).logits
  before = output.logits
  np.testing.assert_array_equal(after[0, :place], before[0, :place])
  np.testing.assert_array_equal(after[1], before[1])
  assert (after[0, place] != before[0, place]).any()
  # It does change what comes after, through memory, convolution, attention.
  assert (after[0, place:] != before[0, place:]).any(axis=-1).all()


def test_packed_documents_equal_each_alone(tables):
  ids = tokens(1)
  breaks = jnp.zeros((BATCH, LENGTH), jnp.int8)
  starts = {0: (0, 4, 5), 1: (3,)}
  for b, places in starts.items():
    breaks = breaks.at[b, jnp.array(places)].set(Break.DOCUMENT_START)
  packed = forward(make(), ids, read(tables, ids, breaks), breaks).logits
  unpacked = forward(make(), ids, read(tables, ids, 0 * breaks), 0 * breaks)
  assert np.abs(packed[0, 4:] - unpacked.logits[0, 4:]).max() > 0.1

  for b, places in starts.items():
    edges = sorted({0, *places, LENGTH})
    for start, stop in itertools.pairwise(edges):
      # Filled up behind: a document does not see what follows it.
      alone = jnp.roll(ids, -start, axis=1)
      found = forward(make(), alone, read(tables, alone)).logits
      np.testing.assert_allclose(
        packed[b, start:stop],
        found[b, : stop - start],
        rtol=1e-4,
        atol=1e-4,
      )


def test_boolean_breaks_are_document_starts(tables):
  ids, starts = tokens(1), jnp.zeros((BATCH, LENGTH), bool).at[:, 4].set(True)
  kinds = starts.astype(jnp.int8) * Break.DOCUMENT_START
  as_bool = forward(make(), ids, read(tables, ids, starts), starts).logits
  as_kind = forward(make(), ids, read(tables, ids, kinds), kinds).logits
  np.testing.assert_array_equal(as_bool, as_kind)


def test_positions_without_text_get_no_memory(tables):
  ids = tokens(1)
  breaks = jnp.zeros((BATCH, LENGTH), jnp.int8).at[0, 3:6].set(Break.NON_TEXT)
  found = forward(make(), ids, read(tables, ids, breaks), breaks)
  for gates in found.gates.values():
    assert not gates[0, 3:6].any() and gates[0, :3].all()


def test_document_layout():
  breaks = jnp.array([[0, 0, 1, 2, 1, 0], [1, 0, 0, 0, 0, 1]], jnp.int8)
  positions, segments = document_layout(breaks)
  assert positions.tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0]]
  assert segments.tolist() == [[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2]]


@pytest.mark.parametrize("memory", [True, False])
def test_breaks_that_are_none_are_refused_outside_jit(tables, memory):
  ids, model = tokens(), make()
  rows = read(tables, ids) if memory else None
  segments = jnp.cumsum(jnp.ones_like(ids), axis=1)
  with pytest.raises(InputError, match=r"^breaks: .*segment_ids="):
    model(ids, rows, breaks=segments)
  with pytest.raises(InputError, match=r"^breaks: 3; valid: 0, 1, 2 of "):
    model(ids, rows, breaks=jnp.zeros_like(ids).at[1, 2].set(3))


@pytest.mark.usefixtures("types_unchecked")
def test_breaks_of_another_shape_or_kind_are_refused():
  ids = tokens()
  with pytest.raises(
    InputError, match=r"^breaks.shape: \(2, 9\); valid: \(2, 1"
  ):
    make()(ids, None, breaks=jnp.zeros((BATCH, LENGTH - 1), jnp.int8))
  with pytest.raises(InputError, match=r"^breaks: dtype float32; valid: "):
    make()(ids, None, breaks=jnp.zeros((BATCH, LENGTH)))


DEEP = dataclasses.replace(
  CONFIG,
  num_layers=5,
  streams=2,
  engram=dataclasses.replace(ENGRAM, layers=(2, 4), streams=2),
)


def test_layer_groups_are_what_lies_between_engram_layers():
  assert layer_groups(DEEP) == [
    LayerGroup("dense_blocks", 0, 1, None),
    LayerGroup("moe_blocks", 0, 1, None),
    LayerGroup("moe_blocks", 1, 3, 0),
    LayerGroup("moe_blocks", 3, 4, 1),
  ]
  first = dataclasses.replace(DEEP.engram, layers=(1, 0))
  assert layer_groups(dataclasses.replace(DEEP, engram=first)) == [
    LayerGroup("dense_blocks", 0, 1, 1),
    LayerGroup("moe_blocks", 0, 4, 0),
  ]
  plain = dataclasses.replace(DEEP, engram=None, moe=None)
  assert layer_groups(plain) == [LayerGroup("dense_blocks", 0, 5, None)]
  assert [num_lower_blocks(c) for c in (DEEP, CONFIG, plain)] == [2, 0, 5]


def test_a_pass_is_its_public_parts():
  """Whoever writes a loop of their own takes the blocks one by one."""
  config = dataclasses.replace(DEEP, engram=None, moe=None)
  model, ids = make(config), tokens()
  positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)

  @jax.jit
  def by_hand(model):
    streams = model.embed(ids)
    assert streams.shape == (BATCH, LENGTH, 2, WIDTH)
    graph, stack = nnx.split(model.dense_blocks)
    for i in range(config.num_layers):
      block = nnx.merge(graph, jax.tree.map(operator.itemgetter(i), stack))
      streams, cache, moe = block(streams, Context(positions))
      assert cache is None and moe is None
    return model.logits(model.unembed(streams))

  expected = forward(model, ids, None).logits
  np.testing.assert_allclose(by_hand(model), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def deep_gradients():
  """Of a loss, with everything kept and every block compiled by itself."""
  return gradients_of(DEEP)


def gradients_of(config):
  """(loss, MoEMetrics, gradients by parameters and rows)."""
  ids, shape = tokens(), (BATCH, LENGTH, 4, 4)
  rows = {i: jax.random.normal(jax.random.key(i), shape) for i in (2, 4)}
  graph, params, rest = nnx.split(make(config), nnx.Param, ...)

  @jax.jit
  def of(params, rows):
    def loss(params, rows):
      out = nnx.merge(graph, params, rest)(ids, rows)
      picked = jax.nn.log_softmax(out.logits)[..., 5]
      return jnp.sum(out.moe.balance_loss) - jnp.mean(picked), out.moe

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, rows)

  (loss, metrics), gradients = of(params, rows)
  return loss, metrics, gradients


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_one_function_however_it_is_compiled(deep_gradients, scan, remat):
  config = dataclasses.replace(DEEP, scan_blocks=scan, remat=remat)
  found = gradients_of(config)
  assert jax.tree.structure(found) == jax.tree.structure(deep_gradients)
  for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(deep_gradients)):
    size = float(jnp.abs(its).max())
    np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_less_is_kept_for_the_gradient(remat):
  """Bytes of the residuals between forward and backward pass."""

  def kept(remat):
    config = dataclasses.replace(DEEP, remat=remat, engram=None)
    graph, params, rest = nnx.split(make(config), nnx.Param, ...)

    def loss(params):
      return jnp.sum(nnx.merge(graph, params, rest)(tokens(), None).hidden)

    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

  assert kept(remat) < 0.8 * kept("none")
  assert kept("block") <= kept(remat)


def test_streams_start_as_a_plain_residual():
  """With mixing that ignores its input, G streams are one stream G times."""
  config = dataclasses.replace(DEEP, engram=None)
  new = Transformer(config, rngs=nnx.Rngs(params=1))
  started = dict(nnx.to_flat_state(nnx.state(new)))
  loud = dict(nnx.to_flat_state(nnx.state(make(config))))

  def is_mixing(path):
    return any(str(part).endswith("_streams") for part in path)

  def with_mixing(change):
    flat = {p: change(p, started[p]) if is_mixing(p) else loud[p] for p in loud}
    return nnx.merge(nnx.graphdef(new), nnx.from_flat_state(flat))

  def silenced(path, leaf):
    return leaf.replace(0 * leaf[...]) if path[-1] == "scale" else leaf

  graph, _ = shapes_of(dataclasses.replace(config, streams=1))
  rest = {path: leaf for path, leaf in loud.items() if not is_mixing(path)}
  plain = nnx.merge(graph, nnx.from_flat_state(rest))
  expected = forward(plain, tokens(), None).logits
  found = forward(with_mixing(silenced), tokens(), None).logits
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # As it starts it is near to that, and not the same.
  near = forward(with_mixing(lambda _, leaf: leaf), tokens(), None).logits
  error = jnp.abs(near - expected)
  assert 0 < error.mean() < 0.1 * jnp.std(expected)


def test_logits_are_made_of_what_is_returned(tables, output):
  out = make()(tokens(), read(tables, tokens()), dispatch="dense")
  rows = read(tables, tokens())
  without = make()(tokens(), rows, dispatch="dense", logits=False)
  assert without.logits is None
  np.testing.assert_array_equal(without.hidden, out.hidden)
  found = out.hidden @ make().output_matrix().T
  np.testing.assert_allclose(found, output.logits, rtol=1e-5, atol=1e-5)


def test_memory_off_is_the_model_without_it(tables, output):
  config = dataclasses.replace(CONFIG, engram=None)
  graph, _ = shapes_of(config)
  paths = nnx.to_flat_state(nnx.state(make()))
  kept = [(path, leaf) for path, leaf in paths if "engrams" not in path]
  assert len(kept) < len(list(paths))
  plain = nnx.merge(graph, nnx.from_flat_state(kept))
  expected = forward(plain, tokens(), None)
  off = forward(make(), tokens(), None)
  assert expected.gates == off.gates == {}
  np.testing.assert_allclose(off.logits, expected.logits, rtol=1e-6, atol=1e-6)
  # Rows of zeros say nothing either: the projections have no bias.
  silent = jax.tree.map(jnp.zeros_like, read(tables, tokens()))
  muted = forward(make(), tokens(), silent).logits
  np.testing.assert_allclose(muted, expected.logits, rtol=1e-5, atol=1e-5)
  assert np.abs(output.logits - off.logits).max() > 0.1


def test_a_head_of_its_own(tables, output):
  tied, config = make(), dataclasses.replace(CONFIG, tie_embeddings=False)
  assert tied.head is None
  graph, state = nnx.split(make(config))
  assert state["head"].shape == (VOCAB, WIDTH)
  # With the tied model's arrays, and its embedding as head.
  flat = dict(nnx.to_flat_state(nnx.state(tied)))
  flat["head",] = nnx.Param(tied.embedding.table[...])
  same = nnx.merge(graph, nnx.from_flat_state(flat))
  found = forward(same, tokens(), read(tables, tokens())).logits
  np.testing.assert_allclose(found, output.logits, rtol=1e-5, atol=1e-5)


def test_rows_get_gradients_only_from_later_losses(tables):
  rows, last = read(tables, tokens()), 5

  def loss(rows):
    logits = forward(make(), tokens(), rows).logits
    chances = jax.nn.log_softmax(logits[:, : last + 1])
    return -jnp.mean(chances[..., 3])

  gradients = jax.grad(loss)(rows)
  for layer in (0, 2):
    found = gradients[layer]
    assert found.shape == rows[layer].shape
    assert not found[:, last + 1 :].any()
    assert jnp.abs(found[:, : last + 1]).max(axis=(2, 3)).all()


def test_bfloat16_computes_in_it_and_keeps_float32_parameters(tables, output):
  engram = dataclasses.replace(ENGRAM, dtype="bfloat16")
  config = dataclasses.replace(CONFIG, dtype="bfloat16", engram=engram)
  model = make(config)
  _, shapes = shapes_of(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype("float32")
  }
  found = forward(model, tokens(), read(tables, tokens()))
  assert found.logits.dtype == jnp.float32
  assert found.gates[0].dtype == jnp.float32
  assert jnp.isfinite(found.logits).all()
  error = jnp.abs(found.logits - output.logits)
  # One of 256 steps per factor of two, and a few of them add up.
  assert 0 < jnp.median(error) < 0.05 * jnp.std(output.logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("memory", [ENGRAM, None], ids=["memory", "plain"])
def test_number_of_parameters(tied, memory):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied, engram=memory)
  _, shapes = shapes_of(config)
  found = sum(leaf.size for leaf in jax.tree.leaves(shapes))

  heads, nope, rope, value, rank = 2, 8, 4, 6, 8
  attention = WIDTH * (rank + rope) + rank  # latent, its norm, rotary key
  attention += rank * heads * (nope + value)  # keys and values of the heads
  attention += WIDTH * heads * (nope + rope)  # queries
  attention += heads * value * WIDTH  # output
  norms = 2 * WIDTH
  dense = 3 * WIDTH * 16
  experts, size = 4, 8
  moe = WIDTH * experts + experts  # router and balancing bias
  moe += 3 * WIDTH * size * (experts + 1)  # one shared
  expected = 3 * (attention + norms) + dense + 2 * moe
  expected += VOCAB * WIDTH * (1 if tied else 2) + WIDTH
  if memory is not None:
    entry = 2 * 2 * 4  # K = 4 columns of 4
    one = 2 * entry * WIDTH  # key and value projections
    one += 2 * WIDTH  # norms of the gate
    one += WIDTH + 3 * WIDTH  # norm and three taps of the convolution
    expected += 2 * one
  assert found == expected


def test_the_model_is_a_pytree(tables):
  leaves, tree = jax.tree.flatten(make())
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  doubled = jax.jit(lambda model: jax.tree.map(lambda x: 2 * x, model))(make())
  assert jax.tree.structure(doubled) == tree
  assert isinstance(doubled, Transformer) and doubled.config == CONFIG
  embedding = 2 * make().embedding.table[...]
  np.testing.assert_array_equal(doubled.embedding.table[...], embedding)


def test_refusals(tables):
  model, ids = make(), tokens()
  rows = read(tables, ids)
  plain = make(dataclasses.replace(CONFIG, engram=None))
  wrong = [
    (model, {0: rows[0]}, r"rows: \[0\]; valid: .*\[0, 2\], or None"),
    (model, {}, r"rows: \[\]; valid: .*\[0, 2\]"),
    (model, rows | {1: rows[0]}, r"rows: \[0, 1, 2\]"),
    (plain, rows, r"rows: \[0, 2\]; valid: .*\[\]"),
    (model, rows | {0: rows[0][:, :, :3]}, "K \\* d = 16"),
  ]
  for which, bad, message in wrong:
    with pytest.raises(InputError, match=message):
      jax.eval_shape(which, ids, bad)
  with pytest.raises(InputError, match="dispatch: sparse"):
    jax.eval_shape(lambda: model(ids, rows, dispatch="sparse"))
