"""Tests of where n-grams recur, against dictionaries of tuples."""

import collections

import numpy as np
import pytest

from engram_jax.analysis.ngram_recurrence import (
  frequency_bands,
  ngram_numbers,
  occurs_earlier,
  training_counts,
)
from engram_jax.errors import InputError


def text(seed, windows, length):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, 3, (windows, length))
  return ids, rng.random((windows, length)) < 0.15


def tuples(ids, starts, order):
  """The n-gram that ends at each position, cut at document and window."""
  found = []
  for row, begins in zip(ids.tolist(), starts.tolist()):
    first = 0
    for t in range(len(row)):
      first = t if begins[t] else first
      found.append(tuple(row[max(first, t - order + 1) : t + 1]))
  return found


@pytest.mark.parametrize("order", [1, 2, 3])
def test_numbers_are_equal_where_the_ngrams_are(order):
  ids, starts = text(0, 5, 20)
  numbers = ngram_numbers(ids, starts, order=order).reshape(-1).tolist()
  pairs = set(zip(tuples(ids, starts, order), numbers))
  assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counts_are_those_of_a_dictionary(order):
  train, asked = text(1, 6, 30), text(2, 4, 11)
  counted = collections.Counter(tuples(*train, order))
  expected = [counted[ngram] for ngram in tuples(*asked, order)]
  found = training_counts(*train, *asked, order=order)
  assert found.shape == (4, 11)
  assert found.reshape(-1).tolist() == expected
  if order == 3:
    assert 0 in expected and max(expected) > 1


def test_earlier_is_earlier_in_the_same_document_and_window():
  ids, starts = text(3, 6, 25)
  expected = []
  for row, begins in zip(ids, starts):
    seen = set()
    ngrams = tuples(row[None], begins[None], 2)
    for ngram, start in zip(ngrams, begins):
      seen = set() if start else seen
      expected.append(ngram in seen)
      seen.add(ngram)
  found = occurs_earlier(ids, starts, order=2)
  assert found.reshape(-1).tolist() == expected
  assert 0 < np.mean(expected) < 1


def test_bands():
  counts = np.array([[0, 1, 2], [3, 4, 99]])
  assert frequency_bands(counts, (1, 4)).tolist() == [[0, 1, 1], [1, 2, 2]]


def test_refusals():
  ids, starts = text(0, 1, 4)
  with pytest.raises(InputError, match=r"^order: 0; valid: an integer >= 1"):
    ngram_numbers(ids, starts, order=0)
  with pytest.raises(InputError, match=r"^edges: .*; valid: one or more asc"):
    frequency_bands(ids, (4, 1))
