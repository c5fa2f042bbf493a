"""Text and questions of the study of long context: code, needles, variables.

Small models cannot find a needle unless they were trained on needles: so both
stages train on code and on the tasks, short and then long. The two stages have
other files of code and other draws of the tasks, and the questions others
again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import tokenizers

from engram_jax.data.synthetic import needles, tracking
from engram_jax.data.synthetic.needles import NeedlesConfig
from engram_jax.data.synthetic.questions import Question, encode
from engram_jax.data.synthetic.tracking import TrackingConfig
from engram_jax.errors import InputError
from experiments.lab.corpora import Corpus, write_corpus
from experiments.lab.runs import Laboratory

Task = NeedlesConfig | TrackingConfig

#: RULER's tasks, by the names that the paper's table has.
TASKS: dict[str, Task] = {
  "single": NeedlesConfig(kind="single", keys=48, values=48, fillers=64),
  "multi-key": NeedlesConfig(kind="multi_key", keys=48, values=48, fillers=64),
  "multi-value": NeedlesConfig(
    kind="multi_value", needles=2, keys=48, values=48, fillers=64
  ),
  "multi-query": NeedlesConfig(
    kind="multi_query", keys=48, values=48, fillers=64
  ),
  "tracking": TrackingConfig(variables=48, values=48, fillers=64),
}

# Bytes of text per token of a run: more than any tokenizer needs. The rest is
# for the held-out part of the shortest runs.
_CODE_BYTES, _TASK_BYTES, _REST = 2, 4, 50_000


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the study at one scale.

  Attributes:
    short: tokens of a sequence of the first stage.
    stretch: the second stage's sequences are so many times as long.
    batch_size: sequences of a step of the first stage.
    short_tokens: tokens of the first stage.
    long_tokens: tokens of the second stage.
    checkpoints: checkpoints of the first stage, evenly spaced.
    lengths: lengths of the questions in tokens, ascending.
    depths: places of the first needle, 0 to 1.
    questions: questions of each task, length and depth.
  """

  short: int
  stretch: int
  batch_size: int
  short_tokens: int
  long_tokens: int
  checkpoints: int
  lengths: tuple[int, ...]
  depths: tuple[float, ...]
  questions: int

  @property
  def long(self) -> int:
    """Tokens of a sequence of the second stage."""
    return self.short * self.stretch


SIZES = {
  "smoke": Sizes(64, 2, 4, 2048, 1024, 2, (96, 128), (0.5,), 2),
  "cpu": Sizes(
    128, 4, 16, 1_500_000, 250_000, 10, (128, 256, 512), (0.1, 0.5, 0.9), 32
  ),
  "gpu": Sizes(
    512,
    8,
    64,
    50_000_000,
    5_000_000,
    10,
    (512, 1024, 2048, 4096),
    (0.1, 0.5, 0.9),
    100,
  ),
}


@functools.lru_cache
def corpus_of_stage(lab: Laboratory, stage: str) -> Corpus:
  """The text of a stage.

  Args:
    lab: the laboratory, for its code.
    stage: `short` or `long`.
  """
  sizes = SIZES[lab.scale.name]
  is_long = stage == "long"
  tokens = sizes.long_tokens if is_long else sizes.short_tokens
  length = sizes.long if is_long else sizes.short
  texts = itertools.chain(
    _code(lab, is_long=is_long, at_most=_CODE_BYTES * tokens),
    # Up to half a sequence: most texts then lie whole in one window.
    _task_texts(
      "validation" if is_long else "train",
      longest=length // 2,
      at_most=_TASK_BYTES * tokens + _REST,
    ),
  )
  return write_corpus(f"{stage}-{lab.scale.name}", texts, root=lab.folder)


def _code(lab: Laboratory, *, is_long: bool, at_most: int) -> Iterator[str]:
  """Every second file for either stage."""
  files, size = sorted(lab.corpus("code").folder.rglob("*.txt")), 0
  for path in files[int(is_long) :: 2]:
    if size >= at_most:
      break
    text = path.read_text(encoding="utf-8")
    size += len(text.encode())
    yield text


def _task_texts(split: str, *, longest: int, at_most: int) -> Iterator[str]:
  """Texts of all tasks in turn, with all the questions that each allows.

  Two of three are short: what is asked for is learnt from the answers, and
  short texts have more of them to a token.
  """
  count = at_most // 64  # more than there is room for
  sources = []
  for part, high in enumerate((longest // 4, longest // 4, longest)):
    for config in TASKS.values():
      if isinstance(config, TrackingConfig):
        module, asked = tracking, config.chains
      else:
        module, asked = needles, config.needles
      sources.append(
        module.documents(
          config,
          words=(0, high),
          count=count,
          split=split,
          asked=asked,
          first=part * count,
        )
      )
  size = 0
  for document in itertools.chain.from_iterable(zip(*sources)):
    if size >= at_most:
      break
    size += len(document.text)
    yield document.text


def ask(
  tokenizer: tokenizers.Tokenizer,
  config: Task,
  *,
  length: int,
  depth: float,
  count: int,
) -> list[Question]:
  """Questions that are about `length` tokens long, and no longer.

  Args:
    tokenizer: the model's.
    config: the task.
    length: tokens of the window.
    depth: place of the first needle, 0 to 1.
    count: number of questions.

  Raises:
    InputError: the task has no text as short as that.
  """
  is_tracking = isinstance(config, TrackingConfig)
  module = tracking if is_tracking else needles
  # From above: a word is a token or more.
  words = length
  while True:
    questions = list(
      module.questions(config, words=words, depth=depth, count=count)
    )
    most = max(sum(map(len, encode(tokenizer, q))) for q in questions)
    if most <= length:
      return questions
    if words == 0:
      raise InputError("length", length, f"{most} or more")
    # As many words less as the tokens that are too many may be, and one.
    words = max(0, min(words - 1, words * length // most))
