"""What is asked of a model: a prompt, and the text that must follow it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from engram_jax.data.tokenizers import PAD_ID
from engram_jax.errors import require
from engram_jax.types import Break

Label = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt and its answer.

  Attributes:
    prompt: text up to the answer, without a space at its end.
    answer: the text that follows it, with its leading space.
    task: name of the task, such as `facts`.
    chance: probability that a guess is right that knows the form of the answers
      and nothing else.
    labels: what answers are counted by, such as the fact's frequency.
  """

  prompt: str
  answer: str
  task: str
  chance: float
  labels: Mapping[str, Label]


def encode(
  tokenizer: tokenizers.Tokenizer, question: Question
) -> tuple[list[int], list[int]]:
  """Tokens of the prompt and of the answer.

  They are the tokens of the whole text, as in training: a byte-level tokenizer
  splits before the space that the answer begins with.

  Args:
    tokenizer: a byte-level tokenizer of this library.
    question: the question to encode.

  Raises:
    InputError: an answer that does not begin where a token does.
  """
  prompt = tokenizer.encode(question.prompt).ids
  whole = tokenizer.encode(question.prompt + question.answer).ids
  valid = "an answer that begins with a space, and a prompt that ends without"
  ok = question.answer[:1] == " " and not question.prompt.endswith(" ")
  ok = ok and whole[: len(prompt)] == prompt and len(whole) > len(prompt)
  require(ok, "question", question.prompt[-40:] + question.answer, valid)
  return prompt, whole[len(prompt) :]


def question_batch(
  tokenizer: tokenizers.Tokenizer,
  questions: Sequence[Question],
  *,
  seq_len: int,
) -> dict[str, np.ndarray]:
  """One window for each question, padded at its end.

  Args:
    tokenizer: a byte-level tokenizer of this library.
    questions: B of them.
    seq_len: L.

  Returns:
    A batch as `pipeline.batches` gives it: int32 `inputs` and `targets`, int8
    `breaks`, and bool `loss_mask`, which is True where the target is a token of
    the answer; [B, L] each.

  Raises:
    InputError: a question longer than L + 1 tokens.
  """
  shape = (len(questions), seq_len)
  tokens = np.full((shape[0], seq_len + 1), PAD_ID, np.int32)
  is_answer = np.zeros(tokens.shape, np.bool_)
  breaks = np.full(shape, Break.NONE, np.int8)
  breaks[:, 0] = Break.DOCUMENT_START
  for row, question in enumerate(questions):
    prompt, answer = encode(tokenizer, question)
    length = len(prompt) + len(answer)
    valid = f"at least {length - 1}: a question has {length} tokens"
    require(length <= seq_len + 1, "seq_len", seq_len, valid)
    tokens[row, :length] = prompt + answer
    is_answer[row, len(prompt) : length] = True
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "breaks": breaks,
    "loss_mask": is_answer[:, 1:],
  }
