"""Decoding from any location of the rows, with the bits of the tables' own."""

import concurrent.futures
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.decoders import Decoder, last_ids
from engram_jax.decoding.generate import generate, generate_all, pad_prompts
from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.open_store import open_store, pack_tables
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.quantization import unpack_rows
from engram_jax.stores.row_cache import CachedStore
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import write_row_file

KEY = jax.random.key(0)
PROMPTS = [[5, 6, 7, 8, 9], [20], [3, 1, 4]]
LOCATIONS = ("device", "pinned", "host", "file")
STEPS, CAPACITY = 4, 16


@pytest.fixture
def store_at(tiny_wide, tmp_path):
  """Opens the model's rows in one of the locations."""

  def open_it(location, name="float32", *, rows=0, tiny=tiny_wide):
    tables, digest = tiny.tables, tiny.compression.digest
    packed, row_format = pack_tables(tables, tiny.hashing, name)
    if location == "file":
      path = tmp_path / "rows"
      chunks = {layer: [x] for layer, x in packed.items()}
      header = Header(row_format, tiny.hashing.num_rows, tiny.hashing, digest)
      write_row_file(path, chunks, header)
      location, tables, name = f"file:{path}", None, None
    return open_store(
      location,
      tables,
      tiny.hashing,
      row_format=name,
      compression_digest=digest,
      cache_bytes=rows * row_format.bytes_per_row * 2,
    )

  return open_it


def with_rows_of(tiny, name):
  """The model with tables that hold what the format leaves of their rows."""
  packed, row_format = pack_tables(tiny.tables, tiny.hashing, name)
  tables = {
    layer: jnp.asarray(unpack_rows(x, row_format))
    for layer, x in packed.items()
  }
  return dataclasses.replace(tiny, tables=tables)


def bits(decoder):
  """Everything that some steps leave behind, as integers."""
  state, found = decoder.init_state(len(PROMPTS), CAPACITY), []
  logits, state = decoder.start(state, *pad_prompts(PROMPTS, vocab_size=24))()
  found.append(np.asarray(logits))
  for _ in range(STEPS):
    tokens = jnp.argmax(logits[:, 1:24], axis=-1).astype(jnp.int32) + 1
    logits, state = decoder.start(state, tokens)()
    found.append(np.asarray(logits))
  # Of the slots beyond a sequence's end nobody reads what padding has left.
  is_read = np.arange(CAPACITY) < np.asarray(state.cache.lengths)[:, None]
  for cache in jax.tree.leaves(state.cache.attention):
    found.append(np.where(is_read[..., None], cache, 0))
  found += map(
    np.asarray,
    jax.tree.leaves(state._replace(cache=state.cache._replace(attention=()))),
  )
  return [x.view(np.int32) for x in found]


@pytest.fixture(scope="module")
def resident(tiny_wide):
  """What the tables give, by the format of their rows."""
  known = {}

  def of(name):
    if name not in known:
      known[name] = bits(Decoder(*with_rows_of(tiny_wide, name).parts))
    return known[name]

  return of


def decoder_of(tiny, store, **options):
  return Decoder(tiny.model, tiny.memory, store, **options)


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("location", LOCATIONS)
def test_every_location_gives_the_bits_of_the_tables(
  tiny_wide, store_at, resident, location, prefetch
):
  store = store_at(location)
  with decoder_of(tiny_wide, store, prefetch=prefetch) as decoder:
    assert_same(bits(decoder), resident("float32"))
  # A compiled program reads those on the device, and counts nothing.
  on_host = location in ("host", "file")
  assert store.statistics.reads == (1 + STEPS if on_host else 0)


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "int8"])
def test_every_format_gives_the_bits_of_tables_of_its_numbers(
  tiny_wide, store_at, resident, name
):
  with decoder_of(tiny_wide, store_at("host", name)) as decoder:
    found = bits(decoder)
  assert_same(found, resident(name))
  packed = decoder_of(tiny_wide, store_at("device", name))
  assert_same(bits(packed), found)
  assert any((x != y).any() for x, y in zip(found, resident("float32")))


@pytest.mark.parametrize("rows", [1, 9, 1000])
def test_a_cache_before_a_location_changes_nothing(
  tiny_wide, store_at, resident, rows
):
  store = store_at("file", "fp8", rows=rows)
  with decoder_of(tiny_wide, store) as decoder:
    found = bits(decoder)
  assert_same(found, resident("fp8"))
  layer = store.by_layer[1]
  assert layer.misses > 0 and (layer.hits > 0 or rows == 1)


def test_the_step_is_compiled_once_whatever_is_read(
  tiny_wide, store_at, compiled
):
  decoder = decoder_of(tiny_wide, store_at("host"), prefetch=False)
  bits(decoder)
  state = decoder.init_state(3, CAPACITY)
  with compiled() as count:
    for tokens in ([1, 1, 1], [1, 2, 3], [7, 7, 19], [9, 4, 2]):
      _, state = decoder.start(state, np.array(tokens, np.int32))()
    assert not count("lower_blocks", "upper_blocks")
    # It would be noticed.
    decoder.start(decoder.init_state(2, 8), np.ones(2, np.int32))()
    assert count("lower_blocks") == count("upper_blocks") == 1


def test_threads_share_a_decoder(tiny_wide, store_at):
  alone = decoder_of(tiny_wide, store_at("host"), prefetch=False)
  prompts = [[5, 6, 7, 8, 9]], [[9, 3, 1, 4]]

  def first_logits(decoder, prompt):
    state = decoder.init_state(1, CAPACITY)
    tokens = pad_prompts(prompt, vocab_size=24)
    return np.asarray(decoder.start(state, *tokens)()[0])

  expected = [first_logits(alone, prompt) for prompt in prompts]
  both_have_read = threading.Barrier(2)

  class Meeting(HostStore):
    def read(self, row_ids, *, buffers=None):
      rows = super().read(row_ids, buffers=buffers)
      both_have_read.wait(60)
      return rows

  packed = pack_tables(tiny_wide.tables, tiny_wide.hashing, "float32")
  decoder = decoder_of(tiny_wide, Meeting(*packed), prefetch=False)
  run = lambda prompt: first_logits(decoder, prompt)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = list(pool.map(run, prompts))
  for one, other in zip(found, expected):
    np.testing.assert_array_equal(one, other)


@pytest.fixture(params=["tables", "host"])
def decoder(request, tiny_wide, store_at):
  on_host = request.param == "host"
  store = store_at("host") if on_host else tiny_wide.store
  return decoder_of(tiny_wide, store, prefetch=False)


def test_a_step_keeps_its_own_tokens(decoder):
  def step(spoil):
    # Aligned as JAX would take it over.
    tokens = np.zeros(64 * 3, np.int32)[: 3 * 16].reshape(3, 16)
    tokens[:, :4] = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 8, 7, 6]]
    state = decoder.init_state(3, 32)
    end = decoder.start(state, tokens, np.full(3, 4))
    if spoil:
      tokens[:] = 11
    return np.asarray(end()[0])

  np.testing.assert_array_equal(step(True), step(False))


def test_a_chunk_that_does_not_fit_is_refused(decoder):
  def start(shape, lengths, value=1):
    state = decoder.init_state(2, 8)
    return decoder.start(state, np.full(shape, value, np.int32), lengths)

  for shape, lengths, line in (
    ((2, 16), [9, 9], "tokens in the cache: 9; valid: 1 <= id < 9"),
    ((2, 4), [5, 1], "lengths: 5; valid: 1 <= id < 5"),
    ((2, 4), [0, 1], "lengths: 0; valid: 1 <= id < 5"),
    ((3, 4), [1, 1, 1], r"batch of tokens, lengths: .*3.*; valid: the state"),
  ):
    with pytest.raises(InputError, match=f"^{line}"):
      start(shape, np.array(lengths, np.int32))
  _, state = start((2, 8), np.array([8, 8], np.int32))()
  with pytest.raises(InputError, match=r"^tokens in the cache: 9"):
    decoder.start(state, np.ones(2, np.int32))
  # Padding may be any id.
  tokens = np.full((2, 8), 10**6, np.int32)
  tokens[:, :3] = 1
  found = decoder.start(
    decoder.init_state(2, 8), tokens, np.full(2, 3, np.int32)
  )()
  tokens[:, 3:] = 0
  expected = decoder.start(
    decoder.init_state(2, 8), tokens, np.full(2, 3, np.int32)
  )()
  np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("wrong", [24, 2**31, 2**32 + 5, 2**40, -1])
def test_ids_that_are_no_tokens_are_refused_and_not_cut(decoder, wrong):
  tokens = np.ones((2, 4), np.int64)
  tokens[1, 2] = wrong
  line = f"^token_ids: {wrong}; valid: 0 <= id < 24"
  with pytest.raises(InputError, match=line):
    decoder.start(decoder.init_state(2, 8), tokens, np.array([4, 3]))
  with pytest.raises(InputError, match=line):
    decoder.start(decoder.init_state(2, 8), tokens[:, 2])
  # It is padding here.
  decoder.start(decoder.init_state(2, 8), tokens, np.array([4, 2]))()
  floats = np.ones(2, np.float32)
  with pytest.raises(InputError, match=r"^token_ids: dtype float32; valid: "):
    decoder.start(decoder.init_state(2, 8), floats)


def test_without_a_memory_any_id_of_the_model_is_a_token(tiny_plain):
  decoder = Decoder(*tiny_plain.parts)
  decoder.start(decoder.init_state(1, 8), np.array([27]))()
  with pytest.raises(InputError, match=r"^token_ids: 28; valid: 0 <= id < 28"):
    decoder.start(decoder.init_state(1, 8), np.array([28]))


def test_generate_takes_a_store(tiny_wide, store_at):
  options = {"max_new_tokens": 5, "key": KEY, "temperature": 1.5}
  expected = generate_all(*tiny_wide.parts, PROMPTS, **options)
  parts = tiny_wide.model, tiny_wide.memory
  for prefetch in (True, False):
    options["prefetch"] = prefetch
    found = generate_all(*parts, store_at("host"), PROMPTS, **options)
    assert found == expected
  assert not threads()


def threads():
  every = threading.enumerate()
  return [t for t in every if t.name.startswith("engram-prefetch")]


class Failing:
  """A store that fails at its third read."""

  def __init__(self, store):
    self.store, self.turns = store, 0
    self.row_format, self.num_rows = store.row_format, store.num_rows
    self.statistics = store.statistics

  def read(self, row_ids, *, buffers=None):
    self.turns += 1
    if self.turns == 3:
      raise OSError("the network is gone")
    return self.store.read(row_ids, buffers=buffers)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_failing_store_is_heard_of_and_leaves_no_thread(
  tiny_wide, store_at, prefetch
):
  steps = generate(
    *(tiny_wide.model, tiny_wide.memory, Failing(store_at("host"))),
    PROMPTS,
    max_new_tokens=9,
    key=KEY,
    prefetch=prefetch,
  )
  assert not threads()
  next(steps)
  with pytest.raises(OSError, match="the network is gone"):
    list(steps)
  assert not threads()


def test_whoever_stops_early_leaves_no_thread(tiny_wide, store_at):
  steps = generate(
    *(tiny_wide.model, tiny_wide.memory, store_at("host")),
    PROMPTS,
    max_new_tokens=9,
    key=KEY,
  )
  next(steps)
  assert threads()
  steps.close()
  assert not threads()


def test_the_history_on_the_host_hashes_as_that_on_the_device(tiny_wide):
  hashing, random = tiny_wide.hashing, np.random.default_rng(0)
  on_host = np.asarray(hashing.empty_history(4))
  on_device = jnp.asarray(on_host)

  @jax.jit
  def step(canonical, history, lengths):
    ids = hashing.hash(canonical, history=history)
    return ids, hashing.next_history(
      canonical, history=history, lengths=lengths
    )

  for _ in range(6):
    canonical = random.integers(0, 12, (4, 3)).astype(np.int32)
    canonical[random.random(canonical.shape) < 0.2] = -1  # not text
    lengths = random.integers(1, 4, 4).astype(np.int32)
    expected, on_device = step(canonical, on_device, lengths)
    for layer, ids in expected.items():
      found = hashing.row_ids_numpy(canonical, layer, history=on_host)
      np.testing.assert_array_equal(found, ids)
    on_host = last_ids(canonical, on_host, lengths)
  assert on_host.dtype == np.int32 and on_host.shape == (4, 2)


def test_refusals_by_name(tiny, tiny_wide, store_at):
  def refused(match):
    return pytest.raises(InputError, match=match)

  with refused("store: disk; valid: device, pinned, host or file:PATH"):
    open_store("disk", tiny_wide.tables, tiny_wide.hashing)
  with refused("row file: .*nowhere; valid: an existing file"):
    open_store("file:nowhere", None, tiny_wide.hashing)
  with refused("tables: None; valid: the tables to be kept on host"):
    open_store("host", None, tiny_wide.hashing)
  with refused("width: 4; valid: a positive multiple of 32 for fp8"):
    open_store("host", tiny.tables, tiny.hashing, row_format="fp8")
  with refused("cache_bytes: -1; valid: 0 for none"):
    open_store("host", tiny.tables, tiny.hashing, cache_bytes=-1)
  with refused("capacity_bytes: 5; valid: at least 32 bytes, a row in each"):
    open_store("host", tiny.tables, tiny.hashing, cache_bytes=5)

  loud = {i: x.at[3, 1].set(jnp.inf) for i, x in tiny_wide.tables.items()}
  for name in ("fp8", "int8", "bfloat16", "float32"):
    with refused("rows: inf; valid: finite numbers"):
      open_store("host", loud, tiny_wide.hashing, row_format=name)
  with refused("verify: True; valid: a store that is file:PATH: host has no"):
    open_store("host", tiny.tables, tiny.hashing, verify=True)

  path = store_at("file", "int8").file.path
  content = bytearray(path.read_bytes())
  content[-5000] ^= 1  # a row's
  damaged = path.with_name("damaged")
  damaged.write_bytes(content)
  open_store(f"file:{damaged}", None, tiny_wide.hashing)
  with refused(r"of .*damaged"):
    open_store(f"file:{damaged}", None, tiny_wide.hashing, verify=True)
  with refused("row_format: fp8; valid: int8, the file's, or none"):
    open_store(f"file:{path}", None, tiny_wide.hashing, row_format="fp8")
  with refused("compression_digest of .*rows: "):
    open_store(
      f"file:{path}", None, tiny_wide.hashing, compression_digest="0" * 64
    )
  other = NgramHash.create(
    vocab_size=12,
    rows_per_head=(60, 70),
    heads=2,
    layers=(1, 2),
    pad_id=0,
    seed=1,
  )
  with refused(r"hash\.multipliers of .*rows: .*; valid: "):
    open_store(f"file:{path}", None, other)
  with refused(r"store.layers: \[1, 2\]; valid: rows of the layers \[0, 2\]"):
    decoder_of(tiny, store_at("host"))
  with refused(r"store.layers: \[1, 2\]; valid: rows of the layers \[0, 2\]"):
    generate(
      *(tiny.model, tiny.memory, store_at("host")),
      PROMPTS,
      max_new_tokens=1,
      key=KEY,
    )
  with refused("store: TableStore; valid: a store of packed rows"):
    CachedStore(TableStore(tiny.tables), capacity_bytes=1000)
