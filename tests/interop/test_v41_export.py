"""A trained memory in V4.1's layout: written, opened, equal; or not at all."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.fusion.engram import EngramParams, param_shapes
from engram_jax.identity import WeightsIdentity
from engram_jax.interop import v41_export
from engram_jax.interop.deepseek_v41 import open_v41
from engram_jax.interop.v41_export import export_v41, pack_chunks
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import RowFormat, pack_rows

CONFIG = EngramConfig(
  hidden_size=20,
  layers=(3, 0),
  rows_per_head=(50, 50),
  heads=3,
  head_dim=64,
  streams=2,
  pad_id=1,
  short_conv=False,
  query_norm_eps=1e-5,
  key_norm_eps=1e-5,
  dtype="bfloat16",
)
FP8 = RowFormat("fp8", 64)


def hash_of(config, **changes):
  settings = dict(
    vocab_size=70,
    rows_per_head=config.rows_per_head,
    heads=config.heads,
    layers=config.layers,
    pad_id=4,
  )
  return NgramHash.create(**(settings | changes))


HASH = hash_of(CONFIG)


@pytest.fixture(scope="module")
def trained():
  """Parameters and tables, three rows of padding at their ends."""
  random = np.random.default_rng(0)
  params, tables = {}, {}
  for layer, rows in HASH.num_rows.items():
    arrays = {
      name: jnp.asarray(random.normal(size=shape), jnp.float32)
      for name, shape in param_shapes(CONFIG).items()
    }
    params[layer] = EngramParams(**arrays)
    tables[layer] = random.normal(size=(rows + 3, 64)).astype(np.float32)
  return params, tables


def chunks(tables):
  return {i: pack_chunks(x, HASH.num_rows[i]) for i, x in tables.items()}


def test_reads_back_what_it_wrote(tmp_path, trained, monkeypatch):
  monkeypatch.setattr(v41_export, "CHUNK", 100)  # several, the last short
  params, tables = trained
  folder = tmp_path / "memory"
  export_v41(folder, CONFIG, HASH, params, chunks(tables))
  assert os.listdir(tmp_path) == ["memory"]
  checkpoint = open_v41(folder, released=False)
  assert checkpoint.config == CONFIG
  assert checkpoint.hashing.to_dict() == HASH.to_dict()
  for layer, table in tables.items():
    ids = np.arange(HASH.num_rows[layer])
    packed = checkpoint.store.read({layer: ids}).packed[layer][: len(ids)]
    expected = pack_rows(table, FP8)[: len(ids)]
    np.testing.assert_array_equal(packed, expected)
    found, given = checkpoint.params(layer), params[layer]
    np.testing.assert_array_equal(found.key_scale, given.key_scale)
    np.testing.assert_array_equal(found.query_scale, given.query_scale)
    found, given = map(np.asarray, (found.projection, given.projection))
    assert 0 < abs(found - given).max() < 0.04 * abs(given).max()
    # The order of keys and value would show as a large error.
  with pytest.raises(InputError, match=r"^text_config\.hidden_size of .*: 20"):
    open_v41(folder)


def test_a_second_export_changes_no_number(tmp_path, trained):
  params, tables = trained
  export_v41(tmp_path / "a", CONFIG, HASH, params, chunks(tables))
  first = open_v41(tmp_path / "a", released=False)

  def stored(layer):
    rows = HASH.num_rows[layer]
    for start in range(0, rows, 70):
      ids = np.arange(start, min(start + 70, rows))
      yield first.store.read({layer: ids}).packed[layer][: len(ids)]

  (tmp_path / "b").mkdir()  # an empty folder may be filled
  layers = CONFIG.layers
  again = {layer: first.params(layer) for layer in layers}
  rows = {layer: stored(layer) for layer in layers}
  export_v41(tmp_path / "b", CONFIG, HASH, again, rows)
  names = sorted(os.listdir(tmp_path / "a"))
  assert names == sorted(os.listdir(tmp_path / "b"))
  # The rows and the rest are the same bytes. The matrices are the same numbers:
  # where rounding made a block's largest entry 224, half its scale serves.
  matrices = names.pop(names.index("model-00001-of-00003.safetensors"))
  for name in names:
    a, b = ((tmp_path / x / name).read_bytes() for x in "ab")
    assert a == b, name
  second = open_v41(tmp_path / "b", released=False)
  for layer, given in again.items():
    for found, expected in zip(second.params(layer)[:3], given[:3]):
      np.testing.assert_array_equal(found, expected)
  again = {layer: second.params(layer) for layer in layers}
  export_v41(tmp_path / "c", CONFIG, HASH, again, chunks(tables))
  b, c = ((tmp_path / x / matrices).read_bytes() for x in "bc")
  assert b == c


def test_the_safetensors_library_reads_it(tmp_path, trained):
  params, tables = trained
  export_v41(tmp_path / "m", CONFIG, HASH, params, chunks(tables))
  index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
  found, total = {}, 0
  for shard in sorted(set(index["weight_map"].values())):
    content = (tmp_path / "m" / shard).read_bytes()
    for name, tensor in safetensors.deserialize(content):
      found[name] = tensor
      assert index["weight_map"][name] == shard
      total += len(tensor["data"])
  assert set(found) == set(index["weight_map"]) and len(found) == 12
  assert index["metadata"]["total_size"] == total
  weight = found["layers.3.engram.embed.weight"]
  assert (weight["dtype"], weight["shape"]) == (
    "F8_E4M3",
    [HASH.num_rows[3], 64],
  )
  packed = pack_rows(tables[3], FP8)[: HASH.num_rows[3]]
  assert weight["data"] == packed[:, :64].tobytes()
  scale = found["layers.3.engram.embed.scale"]
  assert scale["dtype"] == "F8_E8M0"
  assert scale["data"] == packed[:, 64:].tobytes()


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(short_conv=True), r"^short_conv: True; valid: False, as in V4\.1"),
    (dict(projection_bias=True), r"^projection_bias: True"),
    (dict(signed_sqrt=False), r"^signed_sqrt: False"),
    (dict(seed=1), r"^seed: 1; valid: 0"),
    (dict(smallest_order=1), r"^smallest_order: 1; valid: 2, as in the rel"),
    (dict(gate=False), r"^gate: False; valid: True"),
    (dict(key_norm_eps=1e-6), r"^key_norm_eps: 1e-06; valid: query_norm_eps"),
    (dict(rows_per_head=(50, 60)), r"^rows_per_head: \(50, 60\); valid: one"),
  ],
)
def test_refuses_configs(tmp_path, trained, changes, match):
  params, tables = trained
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(InputError, match=match):
    export_v41(tmp_path / "m", config, HASH, params, chunks(tables))
  assert not os.listdir(tmp_path)


def test_refuses_other_hashes_and_layers(tmp_path, trained):
  params, tables = trained
  for hashing, match in (
    (hash_of(CONFIG, seed=1), r"^hashing: another hash; valid: the one that"),
    (hash_of(CONFIG, heads=2), r"^engram_num_embeddings: \["),
  ):
    with pytest.raises(InputError, match=match):
      export_v41(tmp_path / "m", CONFIG, hashing, params, chunks(tables))
  with pytest.raises(InputError, match=r"^chunks: \[3\]; valid: layers"):
    export_v41(tmp_path / "m", CONFIG, HASH, params, {3: []})
  wrong = params | {0: params[0]._replace(key_scale=jnp.zeros((2, 21)))}
  match = r"^params\[0\]\.key_scale: \(2, 21\); valid: \(2, 20\)"
  with pytest.raises(InputError, match=match):
    export_v41(tmp_path / "m", CONFIG, HASH, wrong, chunks(tables))
  nan = jnp.full((2, 20), jnp.nan)
  wrong = params | {0: params[0]._replace(key_scale=nan)}
  with pytest.raises(InputError, match=r"^params\[0\]\.key_scale: NaN or inf"):
    export_v41(tmp_path / "m", CONFIG, HASH, wrong, chunks(tables))
  assert not os.listdir(tmp_path)


def test_nothing_is_left_of_an_export_that_fails(tmp_path, trained):
  params, tables = trained
  rows = HASH.num_rows[0]

  def fails():
    yield np.zeros((5, 66), np.uint8)
    raise RuntimeError("no more rows")

  infinite = tables[0].copy()
  infinite[7, 7] = np.inf
  for last, error, match in (
    (fails(), RuntimeError, "no more rows"),
    (pack_chunks(tables[0], rows - 1), InputError, r"^chunks\[0\]: \d+ rows; "),
    (pack_chunks(tables[0], rows + 1), InputError, r"^chunks\[0\]: \d+ rows; "),
    ([np.zeros((5, 65), np.uint8)], InputError, r"^chunks\[0\]: uint8\[5, 65"),
    (pack_chunks(infinite, rows), InputError, r"^rows: inf; valid: finite"),
  ):
    given = chunks(tables) | {0: last}
    with pytest.raises(error, match=match):
      export_v41(tmp_path / "m", CONFIG, HASH, params, given)
    assert not os.listdir(tmp_path)


MADE_FROM = WeightsIdentity("ab" * 32, 12, "cd" * 32)
EARLIER = WeightsIdentity("ab" * 32, 8, "ef" * 32)


def test_says_what_it_is_from(tmp_path, trained):
  params, tables = trained
  compression = TokenCompression.from_canonical_ids(
    [0, 1, 2, 3, 4, *range(5, 70)]
  )
  hashing = hash_of(CONFIG, pad_id=1)

  def export(name, made_from):
    about = dict(made_from=made_from, compression_digest=compression.digest)
    folder = tmp_path / name
    export_v41(folder, CONFIG, hashing, params, chunks(tables), **about)
    return folder

  folder, earlier = export("m", MADE_FROM), export("e", EARLIER)
  found = open_v41(
    folder, released=False, made_from=MADE_FROM, compression=compression
  )
  assert found.made_from == MADE_FROM
  options = dict(released=False, made_from=MADE_FROM)
  with pytest.raises(InputError, match=r"^step of .*config.json: 8; valid: 12"):
    open_v41(earlier, **options)
  assert open_v41(earlier, allow_other_step=True, **options).made_from.step == 8
  other = WeightsIdentity("12" * 32, 12, "34" * 32)
  with pytest.raises(InputError, match=r"^run of .*config.json: abab"):
    open_v41(folder, released=False, made_from=other, allow_other_step=True)
  # A map of tokens of the same size that is another map.
  swapped = [*range(70), 5]
  swapped = TokenCompression.from_canonical_ids(swapped)
  with pytest.raises(InputError, match=r"^compression\.digest: .*; valid: "):
    open_v41(folder, released=False, compression=swapped)
  # One file of another export, and one that does not say.
  name = "model-00002-of-00003.safetensors"
  own = (folder / name).read_bytes()
  (folder / name).write_bytes((earlier / name).read_bytes())
  with pytest.raises(InputError, match=rf"^step of .*{name}: 8; valid: 12"):
    open_v41(folder, released=False)
  export_v41(tmp_path / "n", CONFIG, hashing, params, chunks(tables))
  (folder / name).write_bytes((tmp_path / "n" / name).read_bytes())
  with pytest.raises(InputError, match=rf"^made_from of .*{name}: None; valid"):
    open_v41(folder, released=False)
  (folder / name).write_bytes(own)
  assert open_v41(tmp_path / "n", released=False).made_from is None
  with pytest.raises(InputError, match=r"^made_from of .*: None; valid: a che"):
    open_v41(tmp_path / "n", **options)


@pytest.mark.parametrize(
  "about, match",
  [
    ([], r"^engram_jax of .*config.json: list; valid: an object"),
    ({"made_from": 3}, r"^engram_jax.made_from of .*config.json: int"),
    ({"compression_digest": 3}, r"^engram_jax.compression_digest of .*: 3"),
  ],
)
def test_what_it_says_may_be_anything(tmp_path, trained, about, match):
  params, tables = trained
  export_v41(tmp_path / "m", CONFIG, HASH, params, chunks(tables))
  path = tmp_path / "m" / "config.json"
  config = json.loads(path.read_text()) | {"engram_jax": about}
  path.write_text(json.dumps(config))
  with pytest.raises(InputError, match=match):
    open_v41(tmp_path / "m", released=False)


def test_never_overwrites(tmp_path, trained):
  params, tables = trained
  (tmp_path / "mine").write_text("notes")
  with pytest.raises(InputError, match=r"^folder: .*; valid: a new or empty"):
    export_v41(tmp_path, CONFIG, HASH, params, chunks(tables))
  with pytest.raises(InputError, match=r"^folder: .*; valid: a new or empty"):
    export_v41(tmp_path / "mine", CONFIG, HASH, params, chunks(tables))
  with pytest.raises(InputError, match=r"^folder: .*within a writable folder"):
    export_v41(tmp_path / "no" / "m", CONFIG, HASH, params, chunks(tables))
  assert os.listdir(tmp_path) == ["mine"]
