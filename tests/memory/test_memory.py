"""Memory: one value from tokens to rows, a step in a model of one's own."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax import nnx

import engram_jax
from engram_jax import EngramConfig, InputError, Memory
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.types import Break

CONFIG = EngramConfig(
  hidden_size=8,
  layers=(2, 0),
  rows_per_head=(50, 60),
  heads=2,
  head_dim=4,
  table_init_std=0.5,
)
VOCAB = 40
BREAKS = np.array([[1, 0, 0, 1, 0, 2], [1, 0, 0, 0, 0, 0]], np.int8)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def memory():
  return Memory.create(CONFIG, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tokenizer():
  words = ["<unk>", "The", "the", " cat", "CAT", "dog", "THE"]
  vocab = {word: i for i, word in enumerate(words)}
  model = tokenizers.models.WordLevel(vocab, unk_token="<unk>")
  return tokenizers.Tokenizer(model)


def test_it_is_compression_and_hash_in_one(tokenizer):
  memory = Memory.create(CONFIG, tokenizer)
  compression = TokenCompression.from_tokenizer(tokenizer)
  assert memory.compression == compression
  assert compression.size < memory.vocab_size == 7
  hashing = NgramHash.create(
    vocab_size=compression.size,
    rows_per_head=CONFIG.rows_per_head,
    heads=CONFIG.heads,
    layers=CONFIG.layers,
    # The pad id is a token's, and so it is compressed: 2 is "the".
    pad_id=int(compression.canonical_ids[CONFIG.pad_id]),
  )
  assert memory.hashing == hashing
  tokens = TOKENS % 7
  found = memory.row_ids(tokens)
  chex.assert_trees_all_equal(
    found, hashing.hash(compression(jnp.asarray(tokens)))
  )
  on_host = memory.row_ids_numpy(tokens)
  assert all(ids.dtype == np.int64 for ids in on_host.values())
  chex.assert_trees_all_equal(found, jax.tree.map(np.int32, on_host))


def test_every_token_may_be_its_own(tokenizer):
  own = dataclasses.replace(CONFIG, compress=False)
  memory = Memory.create(own, tokenizer)
  assert memory.compression == TokenCompression.identity(7)
  compression = TokenCompression.from_tokenizer(tokenizer)
  with pytest.raises(InputError, match=r"^compression\.size: \d; valid: 7 "):
    Memory.from_compression(own, compression)


def test_a_tokenizer_may_be_named_by_its_path(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(str(path))
  memory = Memory.create(CONFIG, tokenizer)
  assert Memory.create(CONFIG, str(path)) == memory
  assert Memory.create(CONFIG, path) == memory


def test_equal_memories_are_one_static_argument(memory):
  again = Memory.create(CONFIG, vocab_size=VOCAB)
  assert again == memory and hash(again) == hash(memory) and again is not memory
  other = Memory.create(dataclasses.replace(CONFIG, seed=1), vocab_size=VOCAB)
  assert other != memory and memory != "memory"

  @chex.assert_max_traces(2)
  def row_ids(memory, tokens):
    return memory.row_ids(tokens)

  jitted = jax.jit(row_ids)  # a static pytree: given like any argument
  for one in (memory, again, other, memory):
    chex.assert_trees_all_equal(jitted(one, TOKENS), one.row_ids(TOKENS))


def test_segment_ids_are_breaks(memory):
  by_breaks = memory.row_ids(TOKENS, breaks=BREAKS)
  by_segments = memory.row_ids(TOKENS, segment_ids=jnp.asarray(SEGMENTS))
  chex.assert_trees_all_equal(by_breaks, by_segments)
  chex.assert_trees_all_equal(
    jax.tree.map(np.int64, by_breaks),
    memory.row_ids_numpy(TOKENS, segment_ids=SEGMENTS),
  )
  # Two documents of one id are told apart by positions.
  one = np.ones_like(SEGMENTS)
  positions = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
  breaks = (positions == 0).astype(np.int8)
  chex.assert_trees_all_equal(
    memory.row_ids(TOKENS, segment_ids=one, positions=positions),
    memory.row_ids(TOKENS, breaks=breaks),
  )


def test_lookup_reads_the_rows_of_the_ids(memory):
  tables = memory.init_tables(jax.random.key(0))
  assert {i: t.shape[0] for i, t in tables.items()} == memory.num_rows
  found = jax.jit(memory.lookup)(tables, TOKENS, breaks=BREAKS)
  chex.assert_trees_all_equal(
    found.row_ids, memory.row_ids(TOKENS, breaks=BREAKS)
  )
  for layer, ids in found.row_ids.items():
    expected = np.asarray(tables[layer])[np.asarray(ids)]
    np.testing.assert_array_equal(found.rows[layer], expected)
  assert found.plan is None and found.is_complete
  assert found.capacity is None and found.capacity_needed is None


@pytest.mark.parametrize("location", ["device", "host"])
def test_lookup_reads_a_store_alike(memory, location):
  tables = memory.init_tables(jax.random.key(0))
  store = memory.open_store(location, tables)
  found = memory.lookup(store, TOKENS, breaks=BREAKS)
  expected = memory.lookup(tables, TOKENS, breaks=BREAKS)
  chex.assert_trees_all_equal(found.rows, expected.rows)
  if location == "device":
    inside = jax.jit(lambda x: memory.lookup(store, x, breaks=BREAKS))(TOKENS)
    chex.assert_trees_all_equal(inside.rows, expected.rows)
  else:
    with pytest.raises(
      InputError, match=r"^store: HostStore inside jit; valid"
    ):
      jax.jit(lambda x: memory.lookup(store, x))(TOKENS)


class Host(nnx.Module):
  """A model of one's own: nothing of this library but the fusion."""

  def __init__(self, rngs):
    size = CONFIG.hidden_size
    self.embed = nnx.Embed(VOCAB, size, rngs=rngs)
    self.engrams = nnx.List(
      [engram_jax.Engram(CONFIG, rngs=rngs) for _ in CONFIG.layers]
    )
    self.head = nnx.Linear(size, VOCAB, rngs=rngs)

  def __call__(self, tokens, rows):
    hidden = self.embed(tokens)[:, :, None]
    for layer, engram in zip(CONFIG.layers, self.engrams):
      hidden = hidden + engram(hidden, rows[layer])[0]
    return self.head(hidden[:, :, 0])


def loss_fn(model, rows, batch):
  logits = model(batch["tokens"], rows)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], batch["tokens"][:, 1:]
  )
  return losses.mean()


def test_a_step_in_a_model_of_ones_own_trains_table_and_model(memory):
  model = Host(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  tables = memory.init_tables(jax.random.key(0))
  start = jax.tree.map(np.array, tables)
  row_tx = engram_jax.row_sparse(optax.scale_by_adam())
  row_state = memory.init_optimizer(row_tx, tables)
  batch = {"tokens": jnp.asarray(TOKENS), "segments": jnp.asarray(SEGMENTS)}

  @nnx.jit(donate_argnames=("tables", "row_state"))
  def train_step(model, optimizer, tables, row_state, batch):
    found = memory.lookup(
      tables, batch["tokens"], segment_ids=batch["segments"]
    )
    loss, (grads, row_grads) = nnx.value_and_grad(loss_fn, argnums=(0, 1))(
      model, found.rows, batch
    )
    optimizer.update(model, grads)
    tables, row_state = memory.update(
      row_tx, tables, row_state, found, row_grads, learning_rate=5e-2
    )
    return tables, row_state, loss

  losses = []
  for _ in range(30):
    tables, row_state, loss = train_step(
      model, optimizer, tables, row_state, batch
    )
    losses.append(float(loss))
  assert losses[-1] < 0.2 * losses[0]
  row_ids = memory.row_ids(TOKENS, segment_ids=batch["segments"])
  for layer, ids in row_ids.items():
    touched = np.zeros(len(start[layer]), bool)
    touched[np.asarray(ids)] = True
    moved = (np.asarray(tables[layer]) != start[layer]).any(axis=1)
    # The last position predicts nothing: its rows may stay.
    assert moved.any() and not moved[~touched].any()


def test_update_equals_the_dense_gradient(memory):
  tables = memory.init_tables(jax.random.key(0))
  rate = 0.1

  def loss(rows):
    return sum(jnp.sum(jnp.sin(x)) for x in rows.values())

  def dense_loss(tables):
    return loss(memory.lookup(tables, TOKENS).rows)

  dense = jax.grad(dense_loss)(tables)
  expected = jax.tree.map(lambda t, g: t - rate * g, tables, dense)
  found = memory.lookup(tables, TOKENS)
  for row_tx, given in (
    (engram_jax.row_sparse(optax.identity()), rate),
    (engram_jax.row_sparse(optax.sgd(rate)), None),
  ):
    state = memory.init_optimizer(row_tx, tables)
    after, _ = memory.update(
      row_tx,
      tables,
      state,
      found,
      jax.grad(loss)(found.rows),
      learning_rate=given,
    )
    chex.assert_trees_all_close(after, expected, rtol=1e-6)


def test_save_and_load(memory, tmp_path):
  path = tmp_path / "memory.npz"
  memory.save(path)
  assert path.stat().st_size < 10_000
  loaded = Memory.load(path, digest=memory.digest)
  assert loaded == memory and loaded.config == CONFIG
  chex.assert_trees_all_equal(loaded.row_ids(TOKENS), memory.row_ids(TOKENS))
  with pytest.raises(InputError, match=f"{memory.digest}; valid: 0123"):
    Memory.load(path, digest="0123")


def test_digests_and_files_outlive_new_fields(memory, tmp_path):
  # As they were before the config had the fields that it marks as later.
  digest = "bcb6e34e0fbc899b00869001495b2c1f11e702cd46380650e6555d45907ea02f"
  assert memory.digest == digest
  other = dataclasses.replace(CONFIG, addressing="one_row")
  assert Memory.create(other, vocab_size=VOCAB).digest != digest
  path, old = tmp_path / "memory.npz", tmp_path / "old.npz"
  memory.save(path)
  stored = dict(np.load(path))
  fields = json.loads(str(stored["config"]))
  for field in dataclasses.fields(EngramConfig):
    if field.metadata.get("later"):
      assert fields.pop(field.name) == field.default
  np.savez(old, **stored | {"config": np.array(json.dumps(fields))})
  assert Memory.load(old, digest=digest) == memory


def test_altered_truncated_and_foreign_files_are_refused(memory, tmp_path):
  path = tmp_path / "memory.npz"
  memory.save(path)
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  with pytest.raises(InputError, match=r"a whole file written by Memory\.save"):
    Memory.load(path)
  memory.compression.save(path)
  with pytest.raises(InputError, match=r"a whole file written by Memory\.save"):
    Memory.load(path)
  with pytest.raises(InputError, match=r"^path: .*missing; valid: a file"):
    Memory.load(tmp_path / "missing")
  memory.save(path)
  with np.load(path) as file:
    stored = dict(file)
  ids = stored["canonical_ids"]
  stored["canonical_ids"] = np.arange(len(ids) + 1, dtype=ids.dtype)
  np.savez(path, **stored)
  with pytest.raises(InputError, match=r"vocab_size: 40; valid: 41"):
    Memory.load(path)
  stored["canonical_ids"] = ids
  stored["config"] = np.array(str(stored["config"]).replace("0.5", "0.25"))
  np.savez(path, **stored)
  with pytest.raises(InputError, match="the file was altered"):
    Memory.load(path)


def refused(match):
  return pytest.raises(InputError, match=match)


def test_refusals(memory, tokenizer, tmp_path):
  with refused("^tokenizer and vocab_size: neither; valid: one of the two"):
    Memory.create(CONFIG)
  with refused("^tokenizer and vocab_size: both"):
    Memory.create(CONFIG, tokenizer, vocab_size=7)
  with refused("^pad_id: 2; valid: a token id, 0 <= id < 2"):
    Memory.create(CONFIG, vocab_size=2)
  with refused("^tokenizer: .*none.json; valid: an existing"):
    Memory.create(CONFIG, tmp_path / "none.json")
  (tmp_path / "bad.json").write_text("{")
  with refused("^tokenizer: .*bad.json; valid: a tokenizer.json"):
    Memory.create(CONFIG, tmp_path / "bad.json")
  with refused("^tokenizer: int; valid"):
    Memory.create(CONFIG, 7)
  with refused("^segment_ids: given with breaks"):
    memory.row_ids(TOKENS, breaks=BREAKS, segment_ids=SEGMENTS)
  with refused("^positions: without segment_ids"):
    memory.row_ids(TOKENS, positions=SEGMENTS)
  with refused(f"^token_ids: {VOCAB}; valid: -1 <= id < {VOCAB}"):
    memory.row_ids(np.full((1, 1), VOCAB))
  tables = memory.init_tables(jax.random.key(0))
  with refused(r"^tables: \[0\]; valid: tables of layers \[0, 2\]"):
    memory.lookup({0: tables[0]}, TOKENS)
  with refused(r"^tables\[0\].shape\[0\]: 3; valid: at least"):
    memory.init_optimizer(engram_jax.sinkhorn(), tables | {0: tables[0][:3]})
  found = memory.lookup(tables, TOKENS)
  row_tx = engram_jax.row_sparse(optax.identity())
  state = memory.init_optimizer(row_tx, tables)
  with refused(r"^row gradients: \[0\]; valid: gradients of layers \[0, 2\]"):
    memory.update(
      row_tx, tables, state, found, {0: found.rows[0]}, learning_rate=1.0
    )
  wrong = found.rows | {0: found.rows[0][:1]}
  with refused(r"^row gradients\[0\]: \(1, 6, 4, 4\); valid: shape"):
    memory.update(row_tx, tables, state, found, wrong, learning_rate=1.0)
  with refused("^learning_rate: None; valid: a number"):
    memory.update(row_tx, tables, state, found, found.rows)
  hashing = dataclasses.replace(memory.hashing, vocab_size=41)
  with refused("^hashing.vocab_size: 41; valid: 40"):
    Memory(CONFIG, memory.compression, hashing)
  with refused("^hashing: layers, heads, max_order"):
    other = dataclasses.replace(CONFIG, layers=(0, 2))
    Memory(other, memory.compression, memory.hashing)


def test_no_text_reads_the_pad_row_everywhere(memory):
  masked = np.where(BREAKS == Break.NON_TEXT, -1, TOKENS)
  starts = np.where(BREAKS == Break.NON_TEXT, 0, BREAKS)
  chex.assert_trees_all_equal(
    memory.row_ids(masked, breaks=starts), memory.row_ids(TOKENS, breaks=BREAKS)
  )
