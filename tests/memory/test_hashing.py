"""The hash against DeepSeek's numbers, against NumPy, and against itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from engram_jax.errors import InputError
from engram_jax.memory.compression import NON_TEXT_ID
from engram_jax.memory.hash_constants import is_prime
from engram_jax.memory.hashing import NgramHash
from engram_jax.types import Break

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "hash.npz")
CASES = {
  case["name"]: case
  for case in json.loads(str(GOLDEN["settings_json"]))
  # Negative ids are positions without text here; the demo indexes with them.
  if case["name"] != "negative_ids"
}


def make_hash(**changes) -> NgramHash:
  settings = dict(
    vocab_size=1000,
    rows_per_head=(101, 211, 307),
    heads=2,
    layers=(1, 4),
    pad_id=3,
    seed=0,
  )
  return NgramHash.create(**{**settings, **changes})


def random_ids(shape, vocab_size=1000, seed=0) -> jax.Array:
  ids = np.random.default_rng(seed).integers(0, vocab_size, shape)
  return jnp.asarray(ids, jnp.int32)


# --- DeepSeek's numbers ---


@pytest.mark.parametrize("name", CASES)
def test_golden_constants_and_ids(name):
  case = CASES[name]
  hashing = NgramHash.create(
    vocab_size=case["compressed_vocab_size"],
    rows_per_head=case["min_rows_per_order"],
    heads=case["heads_per_order"],
    layers=case["layer_ids"],
    pad_id=case["compressed_pad_id"],
    seed=case["seed"],
  )
  ids = GOLDEN[f"{name}/token_ids"]
  if case["lookup"] == "modulo":
    ids = ids % case["compressed_vocab_size"]
  for i, layer in enumerate(case["layer_ids"]):
    offsets = GOLDEN[f"{name}/head_offsets"][i]
    expected = GOLDEN[f"{name}/hash_ids"][i]
    primes = GOLDEN[f"{name}/primes"][i].reshape(-1)
    multipliers = GOLDEN[f"{name}/multipliers"][i]
    np.testing.assert_array_equal(hashing.primes[layer], primes)
    np.testing.assert_array_equal(hashing.multipliers[layer], multipliers)
    np.testing.assert_array_equal(hashing.head_offsets(layer), offsets)
    found = jax.jit(hashing.head_ids, static_argnums=1)(jnp.asarray(ids), layer)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
      hashing.row_ids_numpy(ids, layer), expected + offsets
    )
    if hashing.num_rows[layer] < 2**31:
      found = hashing.row_ids(jnp.asarray(ids), layer)
      np.testing.assert_array_equal(found, expected + offsets)


def test_v41_constants_row_sums_and_vector():
  hashing = NgramHash.create(
    vocab_size=99_092,
    rows_per_head=(16_000_000,) * 3,
    heads=8,
    layers=(1, 14),
    pad_id=2,
  )
  assert hashing.num_rows == {1: 384_006_168, 14: 384_016_682}
  assert hashing.multipliers[1].tolist() == [
    76632096046245,
    4839876093313,
    35959672319349,
    73987337458391,
  ]
  assert hashing.multipliers[14].tolist() == [
    67716810739261,
    51510806800915,
    30921347202721,
    82619226485591,
  ]
  assert hashing.primes[1][[0, -1]].tolist() == [16_000_057, 16_000_463]
  assert hashing.primes[14][[0, -1]].tolist() == [16_000_477, 16_000_889]
  tokens = jnp.array([[5, 7, 11, 13]])
  rows = hashing.hash(tokens)
  first = [4449004, 17571959, 46401655, 53039289]
  last = [327383740, 337689011, 365818642, 378459855]
  assert rows[1][0, 3, :4].tolist() == first
  assert rows[14][0, 3, -4:].tolist() == last


# --- jnp against NumPy int64 and against JAX's own 64 bits ---


@pytest.mark.parametrize("vocab_size", [1, 2, 129_280, 2**31 - 1])
@pytest.mark.parametrize("rows", [2, 2**24, 2**31 - 2**10])
def test_equals_numpy_at_every_size(vocab_size, rows):
  hashing = make_hash(
    vocab_size=vocab_size, rows_per_head=(rows, 101), pad_id=0, layers=(7,)
  )
  ids = np.random.default_rng(1).integers(0, vocab_size, (4, 4096))
  ids[0, :64], ids[1, :64] = 0, vocab_size - 1
  expected = hashing.row_ids_numpy(ids, 7) - hashing.head_offsets(7)
  found = hashing.head_ids(jnp.asarray(ids, jnp.int32), 7)
  np.testing.assert_array_equal(found, expected)


def test_equals_the_short_form_in_jax_x64():
  hashing, ids = make_hash(), random_ids((2, 33))

  def short_form(ids):
    m = jnp.asarray(hashing.multipliers[4])
    wide = jnp.pad(
      ids.astype(jnp.int64), ((0, 0), (3, 0)), constant_values=hashing.pad_id
    )
    mix, columns = 0, []
    for back in range(4):
      mix = mix ^ (wide[:, 3 - back : 36 - back] * m[back])
      columns += [mix] * (2 if back else 0)
    return jnp.stack(columns, -1) % jnp.asarray(hashing.primes[4])

  with jax.enable_x64(True):
    expected = short_form(ids)
  np.testing.assert_array_equal(hashing.head_ids(ids, 4), expected)


def test_under_jit_vmap_scan_and_grad():
  hashing, ids = make_hash(), random_ids((3, 16))
  expected = hashing.row_ids_numpy(np.asarray(ids), 1)
  hash_layer = lambda x: hashing.row_ids(x, 1)
  np.testing.assert_array_equal(jax.jit(hash_layer)(ids), expected)
  vmapped = jax.vmap(lambda row: hash_layer(row[None])[0])(ids)
  np.testing.assert_array_equal(vmapped, expected)
  _, scanned = jax.lax.scan(lambda c, x: (c, hash_layer(x[None])[0]), 0, ids)
  np.testing.assert_array_equal(scanned, expected)

  table = jnp.arange(hashing.num_rows[1], dtype=jnp.float32)
  loss = lambda scale: jnp.sum(scale * table[hash_layer(ids)])
  np.testing.assert_allclose(jax.grad(loss)(2.0), expected.sum(), rtol=1e-6)


# --- orders ---


@pytest.mark.parametrize("smallest", [1, 2, 3])
def test_columns_begin_with_the_smallest_order(smallest):
  # With as many multipliers and no other primes, an order's columns are what
  # they are among others.
  hashing = make_hash(rows_per_head=(101, 211), smallest_order=smallest)
  assert (hashing.max_order, hashing.columns) == (smallest + 1, 4)
  ids = np.asarray(random_ids((2, 9)))
  found = hashing.row_ids_numpy(ids, 4) - hashing.head_offsets(4)
  multipliers, primes = hashing.multipliers[4], hashing.primes[4]
  for t in range(9):
    for column, prime in enumerate(primes.tolist()):
      mix = 0
      for back in range(smallest + column // 2):
        token = int(ids[1, t - back]) if t >= back else hashing.pad_id
        mix ^= token * int(multipliers[back])
      assert found[1, t, column] == mix % prime
  np.testing.assert_array_equal(
    hashing.row_ids(jnp.asarray(ids), 4), found + hashing.head_offsets(4)
  )
  again = NgramHash.from_dict(json.loads(json.dumps(hashing.to_dict())))
  assert again == hashing and again.smallest_order == smallest
  assert ("smallest_order" in hashing.to_dict()) == (smallest != 2)


def test_unigrams_alone_have_no_history():
  hashing = make_hash(rows_per_head=(101,), smallest_order=1)
  ids = random_ids((2, 9))
  assert hashing.max_order == 1 and hashing.columns == 2
  history = hashing.empty_history(2)
  assert history.shape == (2, 0)
  whole = hashing.row_ids(ids, 1)
  for t in range(9):
    one = hashing.row_ids(ids[:, t : t + 1], 1, history=history)
    np.testing.assert_array_equal(one, whole[:, t : t + 1])
    history = hashing.next_history(
      ids[:, t : t + 1], history=history, lengths=jnp.ones(2, jnp.int32)
    )
    assert history.shape == (2, 0) and history.dtype == jnp.int32


# --- a sequence in pieces ---


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_history_continues_a_sequence(cut):
  hashing, ids = make_hash(), random_ids((2, 21))
  breaks = np.random.default_rng(3).choice([0, 0, 0, 1, 2], (2, 21))
  breaks = jnp.asarray(breaks, jnp.int8)
  whole = hashing.hash(ids, breaks=breaks)
  history, pieces = hashing.empty_history(2), []
  for i in range(0, 21, cut):
    part = dict(history=history, breaks=breaks[:, i : i + cut])
    pieces.append(hashing.hash(ids[:, i : i + cut], **part))
    on_host = hashing.row_ids_numpy(
      np.asarray(ids[:, i : i + cut]),
      4,
      history=np.asarray(history),
      breaks=np.asarray(part["breaks"]),
    )
    np.testing.assert_array_equal(pieces[-1][4], on_host)
    history = hashing.next_history(ids[:, i : i + cut], **part)
  for layer, expected in whole.items():
    found = jnp.concatenate([piece[layer] for piece in pieces], axis=1)
    np.testing.assert_array_equal(found, expected)


def test_next_history_of_right_padded_prompts():
  hashing, ids = make_hash(), random_ids((4, 9))
  lengths = jnp.array([1, 2, 5, 9])
  together = hashing.next_history(ids, lengths=lengths)
  for i, length in enumerate(lengths):
    alone = hashing.next_history(ids[i : i + 1, : int(length)])
    np.testing.assert_array_equal(together[i], alone[0])


def test_a_later_token_changes_nothing_before_it():
  hashing, ids = make_hash(), random_ids((1, 12))
  before = hashing.row_ids(ids, 1)
  after = hashing.row_ids(ids.at[0, 8].add(1), 1)
  np.testing.assert_array_equal(before[:, :8], after[:, :8])
  assert (before[:, 8:] != after[:, 8:]).any()


# --- breaks ---


@pytest.mark.parametrize("on_host", [False, True])
def test_a_packed_document_never_sees_its_neighbour(on_host):
  hashing = make_hash()
  documents = [random_ids((1, n), seed=n) for n in (1, 2, 3, 6)]
  packed = jnp.concatenate(documents, axis=1)
  starts = np.zeros(packed.shape, bool)
  starts[0, [0, 1, 3, 6]] = True

  def run(ids, breaks=None):
    if on_host:
      return hashing.row_ids_numpy(np.asarray(ids), 4, breaks=breaks)
    breaks = None if breaks is None else jnp.asarray(breaks)
    return hashing.row_ids(ids, 4, breaks=breaks)

  alone = np.concatenate([run(d) for d in documents], axis=1)
  np.testing.assert_array_equal(run(packed, starts), alone)
  assert (np.asarray(run(packed)) != alone).any()


def test_non_text_latches_for_all_larger_shifts():
  # One image token between a, b and c, d: c's look-backs find nothing, d's
  # find c and nothing beyond, although b lies within reach of the order.
  hashing = make_hash(rows_per_head=(101, 211), layers=(1,))
  a, b, c, d = 11, 12, 13, 14
  packed = jnp.array([[a, b, NON_TEXT_ID, c, d]])
  after = hashing.row_ids(packed, 1)[:, 3:]
  np.testing.assert_array_equal(after, hashing.row_ids(jnp.array([[c, d]]), 1))
  # The same said by breaks, whatever id stands there.
  breaks = jnp.array([[0, 0, Break.NON_TEXT, 0, 0]], jnp.int8)
  ids = packed.at[0, 2].set(500)
  found = hashing.row_ids(ids, 1, breaks=breaks)
  np.testing.assert_array_equal(found, hashing.row_ids(packed, 1))
  # The position itself hashes the pad id alone.
  pads = hashing.row_ids(jnp.full((1, 1), hashing.pad_id), 1)
  np.testing.assert_array_equal(found[:, 2], pads[:, 0])


# --- storage ---


def test_constants_survive_json_without_a_draw(monkeypatch):
  hashing = make_hash()
  text = json.dumps(hashing.to_dict())
  with monkeypatch.context() as patch:
    patch.setattr(np.random, "default_rng", None)
    again = NgramHash.from_dict(json.loads(text))
  assert again.to_dict() == hashing.to_dict()
  ids = random_ids((1, 8))
  np.testing.assert_array_equal(again.row_ids(ids, 4), hashing.row_ids(ids, 4))


def test_primes_never_repeat_and_follow_the_order_of_layers():
  forward, backward = make_hash(layers=(1, 4)), make_hash(layers=(4, 1))
  taken = np.concatenate(list(forward.primes.values()))
  assert len(set(taken.tolist())) == len(taken)
  assert all(is_prime(int(p)) for p in taken)
  np.testing.assert_array_equal(forward.primes[1], backward.primes[4])
  np.testing.assert_array_equal(forward.multipliers[1], backward.multipliers[1])


def test_is_prime_against_a_sieve():
  sieve = np.ones(20_000, bool)
  sieve[:2] = False
  for i in range(2, 142):
    sieve[i * i :: i] &= not sieve[i]
  assert [is_prime(n) for n in range(20_000)] == sieve.tolist()
  assert is_prime(2**31 - 1) and not is_prime((2**31 - 1) * (2**13 - 1))


# --- refusals ---


@pytest.mark.parametrize(
  "changes, field",
  [
    (dict(vocab_size=0), "vocab_size: 0"),
    (dict(rows_per_head=()), "rows_per_head"),
    (dict(rows_per_head=(1,)), "rows_per_head"),
    (dict(heads=0), "heads: 0"),
    (dict(layers=(1, 1)), "layers"),
    (dict(layers=(-1,)), "layers"),
    (dict(pad_id=1000), "pad_id: 1000"),
    (dict(seed=-1), "seed: -1"),
    (dict(rows_per_head=(2**31,)), "primes"),
  ],
)
def test_create_refuses(changes, field):
  with pytest.raises(InputError, match=field):
    make_hash(**changes)


def test_ids_out_of_range_are_refused():
  hashing = make_hash()
  bad = random_ids((1, 4)).at[0, 2].set(1000)
  with pytest.raises(InputError, match=r"canonical: 1000; valid: .* < 1000"):
    hashing.row_ids(bad, 1)
  with pytest.raises(InputError, match="canonical: 1000"):
    hashing.row_ids_numpy(np.asarray(bad), 1)

  def validated(x):
    hashing.validate(x)
    return hashing.row_ids(x, 1)

  with pytest.raises(InputError, match="canonical: 1000"):
    validated(bad)
  checked = jax.jit(checkify.checkify(validated, errors=checkify.user_checks))
  error, _ = checked(bad)
  with pytest.raises(checkify.JaxRuntimeError, match="canonical: 1000"):
    error.throw()
  error, _ = checked(random_ids((1, 4)))
  error.throw()


def test_wrong_layers_shapes_and_constants_are_refused():
  hashing, ids = make_hash(), random_ids((2, 5))
  with pytest.raises(InputError, match=r"layer: 2; valid: .*\(1, 4\)"):
    hashing.row_ids(ids, 2)
  # The NumPy form has no shape annotations to speak before these checks.
  for name in ("history", "breaks"):
    wrong = {name: np.zeros((2, 4), np.int32)}
    with pytest.raises(InputError, match=rf"{name}: \(2, 4\)"):
      hashing.row_ids_numpy(np.asarray(ids), 1, **wrong)
  large = make_hash(rows_per_head=(2**30,), layers=(1,))
  with pytest.raises(InputError, match=r"num_rows\[1\].*row_ids_numpy"):
    large.row_ids(ids, 1)
  constants = hashing.to_dict()
  constants["multipliers"][0][0] = 2**62
  with pytest.raises(InputError, match=r"multipliers\[1\]"):
    NgramHash.from_dict(constants)
  del constants["primes"]
  with pytest.raises(InputError, match=r"hash\.primes: missing"):
    NgramHash.from_dict(constants)


@pytest.mark.parametrize(
  "name, value",
  [
    ("vocab_size", 10.5),
    ("rows_per_head", (50.5,)),
    ("heads", 2.0),
    ("layers", (1.0,)),
    ("pad_id", 0.5),
    ("seed", 0.5),
    ("seed", -1),
  ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_constants_that_would_be_rounded_are_refused(name, value):
  constants = dict(
    vocab_size=10, rows_per_head=(50,), heads=2, layers=(1,), pad_id=0, seed=0
  )
  with pytest.raises(InputError, match=rf"^{name}: "):
    NgramHash.create(**constants | {name: value})


@pytest.mark.usefixtures("types_unchecked")
def test_ids_that_are_no_integers_are_refused():
  hashing = NgramHash.create(
    vocab_size=10, rows_per_head=(50,), heads=2, layers=(1,), pad_id=0
  )
  ids = np.array([[1, 2, 3]])
  for form in (hashing.row_ids, hashing.row_ids_numpy):
    with pytest.raises(InputError, match=r"^canonical: dtype float"):
      form(ids + 0.5, 1)
    # 2**32 + 1 is 1 in 32 bits.
    with pytest.raises(InputError, match=r"^canonical: 4294967297"):
      form(ids + 2**32, 1)
  with pytest.raises(InputError, match=r"^lengths: 4"):
    hashing.next_history(ids, lengths=np.array([4]))
