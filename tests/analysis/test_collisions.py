"""Collisions, Zipf fits and caches against plain Python and known laws."""

import collections
import itertools
import math

import numpy as np
import pytest

from engram_jax.analysis import collisions as lib
from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash


def zipf_ids(seed, count, different):
  rng = np.random.default_rng(seed)
  return rng.zipf(1.2, count) % different * 7919


def naive_lru(ids, size, start=0):
  cache, hits = collections.OrderedDict(), 0
  for i, item in enumerate(ids.tolist()):
    hits += item in cache and i >= start
    cache[item] = None
    cache.move_to_end(item)
    if len(cache) > size:
      cache.popitem(last=False)
  return hits / (len(ids) - start)


def naive_distances(ids):
  stack, distances = [], []
  for item in ids.tolist():
    distances.append(stack.index(item) if item in stack else -1)
    if item in stack:
      stack.remove(item)
    stack.insert(0, item)
  return distances


# --- n-grams ---


def test_ngrams_are_those_of_python():
  rng = np.random.default_rng(0)
  canonical = rng.integers(0, 4, 300).astype(np.int32)
  starts = rng.random(300) < 0.1
  starts[0] = True
  found = lib.ngram_ids(canonical, starts, max_order=4, pad_id=2)
  assert found.shape == (300, 3)
  for column, order in enumerate((2, 3, 4)):
    numbers, document = {}, []
    for token, start, number in zip(canonical, starts, found[:, column]):
      document = [2] * 3 if start else document
      document = [*document, int(token)]
      gram = tuple(document[-order:])
      assert numbers.setdefault(gram, number) == number
    assert len(set(numbers.values())) == len(numbers)
    assert found[:, column].max() == len(numbers) - 1


def test_orders_from_the_smallest_on():
  ids = np.array([7, 5, 7, 5, 7])
  starts = np.array([True, False, False, False, True])
  found = lib.ngram_ids(ids, starts, max_order=3, pad_id=0, smallest_order=1)
  np.testing.assert_array_equal(found[:, 0], [1, 0, 1, 0, 1])
  np.testing.assert_array_equal(
    found[:, 1:], lib.ngram_ids(ids, starts, max_order=3, pad_id=0)
  )
  alone = lib.ngram_ids(ids, starts, max_order=1, pad_id=0, smallest_order=1)
  np.testing.assert_array_equal(alone, found[:, :1])
  with pytest.raises(InputError, match=r"^max_order: 1; valid: an integer >= "):
    lib.ngram_ids(ids, starts, max_order=1, pad_id=0)


def test_collisions_by_hand():
  ngrams = np.array([0, 1, 2, 3, 0, 3])
  rows = np.array([[1, 9], [1, 8], [2, 7], [2, 7], [1, 9], [2, 7]])
  found = lib.count_collisions(ngrams, rows)
  # 0 and 1 share a row in the first head; 2 and 3 in both.
  assert found == lib.Collisions(
    ngrams=4, rows=(2, 3), by_shared_heads=(0, 2, 2), equal=2
  )


def test_collisions_of_the_hash_are_those_of_chance():
  tokens = np.random.default_rng(0).integers(0, 99_092, (1, 20_000))
  hashing = NgramHash.create(
    vocab_size=99_092, rows_per_head=(50_000,), heads=4, layers=(1,), pad_id=2
  )
  ngrams = lib.ngram_ids(
    tokens[0], np.arange(20_000) == 0, max_order=2, pad_id=2
  )
  found = lib.count_collisions(
    ngrams[:, 0], hashing.row_ids_numpy(tokens, 1)[0]
  )
  assert found.ngrams == 20_000 and found.equal == 0
  alone = (1 - 1 / 50_000) ** 19_999
  for heads, count in enumerate(found.by_shared_heads):
    chance = math.comb(4, heads) * alone ** (4 - heads) * (1 - alone) ** heads
    expected = 20_000 * chance
    assert abs(count - expected) < 6 * math.sqrt(expected)
  occupied = hashing.primes[1] * (1 - np.exp(-20_000 / hashing.primes[1]))
  np.testing.assert_allclose(found.rows, occupied, rtol=0.01)


def test_three_heads_tell_all_mixes_apart():
  assert 16_000_057**3 > 2**63  # the claim at the head of the file


# --- Zipf ---


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.3])
def test_zipf_exponent_of_exact_counts(exponent):
  counts = np.rint(2e5 * np.arange(1, 1001) ** -exponent).astype(int)
  ids = np.random.default_rng(0).permutation(np.repeat(np.arange(1000), counts))
  fit = lib.zipf_exponent(ids)
  assert fit.first_rank == 10
  assert fit.last_rank == np.sum(counts >= 10)
  assert fit.least_squares == pytest.approx(exponent, abs=0.01)
  assert fit.maximum_likelihood == pytest.approx(exponent, abs=0.01)


def test_zipf_exponent_of_draws():
  law = np.arange(1, 501) ** -0.9
  rng = np.random.default_rng(1)
  ids = rng.choice(500, size=200_000, p=law / law.sum())
  fit = lib.zipf_exponent(ids, first_rank=5)
  assert fit.least_squares == pytest.approx(0.9, abs=0.02)
  assert fit.maximum_likelihood == pytest.approx(0.9, abs=0.01)


def test_equal_counts_have_exponent_zero():
  fit = lib.zipf_exponent(np.tile(np.arange(50), 20))
  np.testing.assert_allclose(fit[:2], 0, atol=1e-9)


# --- batches ---


def test_distinct_share_is_that_of_sets():
  ids = zipf_ids(0, 600, 40).reshape(300, 2) * 2 + np.arange(2)
  for batch in (1, 7, 64, 300):
    parts = [ids[i : i + batch] for i in range(0, 301 - batch, batch)]
    distinct = sum(len(set(part.flatten().tolist())) for part in parts)
    expected = distinct / (len(parts) * batch * 2)
    assert lib.distinct_share(ids, batch) == pytest.approx(expected)
  assert lib.distinct_share(ids, 1) == 1


def test_decode_order_by_hand():
  # The second slot takes the third document as soon as it is free.
  assert lib.decode_order([3, 1, 2, 1], 2).tolist() == [0, 3, 1, 4, 2, 5, 6]
  assert lib.decode_order([3, 1, 2], 1).tolist() == list(range(6))
  assert lib.decode_order([2, 2], 9).tolist() == [0, 2, 1, 3]


def test_decode_order_is_causal_and_whole():
  lengths = np.random.default_rng(0).integers(1, 40, 50).tolist()
  order = lib.decode_order(lengths, 8)
  assert sorted(order.tolist()) == list(range(sum(lengths)))
  turn = np.argsort(order)
  begins = np.cumsum([0, *lengths])
  for first, last in itertools.pairwise(begins):
    assert (np.diff(turn[first:last]) > 0).all()
    # A token in every step, and at most 8 tokens a step.
    assert (np.diff(turn[first:last]) <= 8).all()


# --- caches ---


def test_stack_distances_by_hand():
  ids = np.array([5, 6, 7, 5, 5, 6])
  assert lib.stack_distances(ids).tolist() == [-1, -1, -1, 2, 0, 2]
  assert lib.stack_distances(ids[:0]).tolist() == []
  assert lib.stack_distances(np.arange(9)).tolist() == [-1] * 9


# Around the groups of 32 that are compared pair by pair, and far above them.
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 65, 100, 2500])
def test_stack_distances_against_a_stack(count):
  for different in (3, 200):
    ids = zipf_ids(count, count, different)
    assert lib.stack_distances(ids).tolist() == naive_distances(ids)


def test_lru_of_every_size_against_a_cache():
  ids, sizes = zipf_ids(3, 3000, 500), [1, 2, 3, 10, 50, 200, 499, 9999]
  for start in (0, 1, 1700):
    found = lib.lru_hit_rates(ids, sizes, start=start)
    expected = [naive_lru(ids, size, start) for size in sizes]
    np.testing.assert_array_equal(found, expected)


def test_lru_of_all_heads_is_that_of_one():
  ids = zipf_ids(4, 2000, 300)
  heads = (ids[:, None] * 8 + np.arange(8)).reshape(-1)
  sizes = [1, 5, 20, 100, 300]
  np.testing.assert_array_equal(
    lib.lru_hit_rates(heads, [8 * size for size in sizes]),
    lib.lru_hit_rates(ids, sizes),
  )


def test_static_hot_set():
  train = np.array([4, 4, 4, 9, 9, 1, 7])
  test = np.array([9, 4, 1, 2, 7, 4, 100, 0])
  # Hot are 4, then 9, then 1 and 7 in the order of their ids.
  found = lib.static_hit_rates(train, test, [1, 2, 3, 4, 50])
  np.testing.assert_array_equal(found * 8, [2, 3, 4, 5, 5])


def test_a_hot_set_of_the_same_text_is_the_best_there_is():
  ids, sizes = zipf_ids(5, 4000, 300), [1, 10, 100, 300]
  found = lib.static_hit_rates(ids, ids, sizes)
  counts = sorted(collections.Counter(ids.tolist()).values(), reverse=True)
  expected = [sum(counts[:size]) / 4000 for size in sizes]
  np.testing.assert_allclose(found, expected)


# --- bad input ---

IDS = np.arange(8)


@pytest.mark.parametrize(
  "field, call",
  [
    ("sizes", lambda: lib.lru_hit_rates(IDS, [])),
    ("sizes", lambda: lib.lru_hit_rates(IDS, [4, 0])),
    ("ids", lambda: lib.lru_hit_rates(IDS, [4], start=8)),
    ("ids", lambda: lib.static_hit_rates(IDS, IDS[:0], [4])),
    ("train_ids", lambda: lib.static_hit_rates(IDS[:0], IDS, [4])),
    ("batch", lambda: lib.distinct_share(IDS[:, None], 0)),
    ("batch", lambda: lib.distinct_share(IDS[:, None], 9)),
    ("slots", lambda: lib.decode_order([1], 0)),
    ("ids", lambda: lib.zipf_exponent(IDS)),
    ("first_rank", lambda: lib.zipf_exponent(IDS, first_rank=0)),
    (
      "max_order",
      lambda: lib.ngram_ids(IDS, IDS == 0, max_order=1, pad_id=0),
    ),
  ],
)
def test_bad_input_names_its_field(field, call):
  with pytest.raises(InputError, match=f"^{field}: .*; valid: "):
    call()
