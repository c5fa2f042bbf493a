"""Tests of how questions become tokens."""

import numpy as np
import pytest

from engram_jax.data.synthetic import facts
from engram_jax.data.synthetic.questions import (
  Question,
  encode,
  question_batch,
)
from engram_jax.data.tokenizers import train_tokenizer
from engram_jax.errors import InputError
from engram_jax.types import Break

CONFIG = facts.FactsConfig(entities=32, attributes=2, frequencies=(4,))


@pytest.fixture(scope="module")
def tokenizer():
  texts = [x.text for x in facts.documents(CONFIG)]
  return train_tokenizer(texts, vocab_size=600)


def test_names_are_ngrams_of_a_few_tokens(tokenizer):
  names = {fact.entity for fact in facts.make_facts(CONFIG)}
  lengths = [len(tokenizer.encode(f" {name}").ids) for name in names]
  assert min(lengths) >= 2 and np.mean(lengths) <= 6


def test_tokens_are_those_of_the_whole_text(tokenizer):
  for question in facts.questions(CONFIG):
    prompt, answer = encode(tokenizer, question)
    assert tokenizer.decode(prompt) == question.prompt
    assert tokenizer.decode(answer) == question.answer
    text = question.prompt + question.answer
    assert prompt + answer == tokenizer.encode(text).ids


def test_a_batch_asks_for_the_answer_alone(tokenizer):
  questions = list(facts.questions(CONFIG))[:5]
  batch = question_batch(tokenizer, questions, seq_len=64)
  assert {x.shape for x in batch.values()} == {(5, 64)}
  np.testing.assert_array_equal(
    batch["inputs"][:, 1:], batch["targets"][:, :-1]
  )
  assert (batch["breaks"][:, 0] == Break.DOCUMENT_START).all()
  for row, question in enumerate(questions):
    asked = batch["targets"][row][batch["loss_mask"][row]]
    assert tokenizer.decode(asked.tolist()) == question.answer


def test_what_does_not_fit_is_refused(tokenizer):
  questions = list(facts.questions(CONFIG))[:1]
  with pytest.raises(InputError, match="seq_len"):
    question_batch(tokenizer, questions, seq_len=3)
  no_space = Question("The home of", "xyz", "facts", 0.1, {})
  with pytest.raises(InputError, match="begins with a space"):
    encode(tokenizer, no_space)
