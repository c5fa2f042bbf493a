"""Tests of the classes of a source's tokens."""

import pytest

from engram_jax.analysis.token_classes import (
  CLASSES,
  token_classes,
  word_ends,
)

SOURCE = [
  ("def", "keyword"),
  (" area", "name"),
  ("_of", "name"),
  ("(", "operator"),
  ("self", "name"),
  (", x", "name"),
  ("):", "operator"),
  ("\n  ", "space"),
  ('"""', "prose"),
  ("The", "prose"),
  (" if", "prose"),
  (" 'n", "prose"),
  ('."""', "prose"),
  ("\n", "space"),
  ("  #", "prose"),
  (" it's", "prose"),
  (" ", "prose"),
  ("\n", "space"),
  (" return", "keyword"),
  (" 3", "number"),
  (".5e1", "number"),
  (" *", "operator"),
  (" x", "name"),
  ("['", "string"),
  ("a#b", "string"),
  (" ", "string"),
  ("c'", "string"),
  ("]", "operator"),
  ("", "other"),
  (" é", "name"),
]


def test_each_token_is_what_its_document_says():
  texts, expected = zip(*SOURCE)
  assert token_classes(texts).tolist() == list(expected)
  assert set(expected) == set(CLASSES)
  assert token_classes([]).tolist() == []


@pytest.mark.parametrize(
  "text, last", [('"""cut', "prose"), ("'cut", "string"), ("'a\nb", "name")]
)
def test_a_source_that_is_cut_off(text, last):
  assert token_classes(list(text))[-1] == last


def test_ends_of_words_of_two_tokens_or_more():
  texts = ["def", " area", "_of", "(", "self", ", x", "y", " z"]
  ends = [False, False, True, False, False, False, True, False]
  assert word_ends(texts).tolist() == ends
  assert word_ends(["ab", "cd"]).tolist() == [False, True]
  assert word_ends(["ab"]).tolist() == [False]
  assert word_ends([]).tolist() == []
