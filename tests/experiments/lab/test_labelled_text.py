"""Labels of held-out tokens, against the whole text and dictionaries."""

import collections
import itertools

import numpy as np
import pytest

from engram_jax.analysis.gates import token_texts
from engram_jax.analysis.token_classes import token_classes, word_ends
from engram_jax.data.pipeline import windows
from engram_jax.data.prepared import prepare
from engram_jax.data.text_dataset import read_index
from engram_jax.run_config import DataConfig, TrainConfig
from experiments.lab.labelled_text import (
  BANDS,
  ORIGINS,
  label_text,
  training_windows,
)

TRAIN = TrainConfig(steps=6, batch_size=4, seq_len=16, warmup_steps=1, seed=3)
COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sources")
  rng = np.random.default_rng(0)
  names = ["alpha", "beta", "gamma_delta", "epsilon"]
  for i in range(60):
    lines = [f'"""The if of {i}."""']
    for _ in range(6):
      a, b = rng.choice(names, 2)
      lines.append(f"def {a}({b}):\n  return {b} + {i}  # for {a}")
    (folder / f"m{i}.py").write_text("\n".join(lines) + "\n")
  config = DataConfig(
    folder=str(folder),
    data_dir=str(tmp_path_factory.mktemp("data")),
    vocab_size=300,
    validation_percent=30,
  )
  return prepare(config)


@pytest.fixture(scope="module")
def text(data):
  return label_text(data, TRAIN, count=COUNT)


def kept(data, labels):
  """The labels of the targets and of the inputs of the windows."""
  source = windows(data, "validation", seq_len=TRAIN.seq_len)
  targets, inputs = [], []
  for i in np.linspace(0, source.windows - 1, COUNT).round().astype(int):
    first, mask = i * TRAIN.seq_len, source[i]["loss_mask"]
    stop = first + TRAIN.seq_len
    targets += labels[first + 1 : stop + 1][mask].tolist()
    inputs += labels[first:stop][mask].tolist()
  return targets, inputs


def test_classes_are_those_of_whole_documents(data, text):
  source = windows(data, "validation", seq_len=TRAIN.seq_len)
  _, starts = read_index(data.folder, "validation")
  edges = [*starts.tolist(), source.tokens]
  classes, ends = [], []
  for start, stop in itertools.pairwise(edges):
    texts = token_texts(data.tokenizer, source.read(start, stop))
    classes.append(token_classes(texts))
    ends.append(word_ends(texts))
  targets, inputs = kept(data, np.concatenate(classes))
  assert text.target_class.tolist() == targets
  assert text.input_class.tolist() == inputs
  assert {"keyword", "prose", "name"} <= set(targets)
  assert text.ends_word.tolist() == kept(data, np.concatenate(ends))[1]
  assert text.ends_word.any()


def test_origins_are_those_of_a_dictionary(data, text):
  def trigrams(inputs, targets, mask):
    """Per target that counts: its trigram, and those before it."""
    for x, y, keep in zip(inputs, targets, mask):
      whole, document = [*x.tolist(), y[-1]], []
      for t, token in enumerate(whole):
        if t and not keep[t - 1]:
          document = []  # the first token of another one
        document.append(token)
        grams = [
          tuple(document[max(0, i - 2) : i + 1]) for i in range(len(document))
        ]
        if t and keep[t - 1]:
          yield grams[-1], grams[:-1]

  seen = training_windows(data, TRAIN)
  assert len(seen["inputs"]) == TRAIN.steps * TRAIN.batch_size
  fields = ("inputs", "targets", "loss_mask")
  stored = collections.Counter()
  for gram, before in trigrams(*(seen[k] for k in fields)):
    stored.update([gram, *before])
  batches = [[batch[k] for k in fields] for batch in text.batches]
  expected = []
  for batch in batches:
    for gram, before in trigrams(*batch):
      expected.append(ORIGINS[(gram in before) + 2 * (gram in stored)])
  assert text.origin.tolist() == expected
  assert set(expected) >= {"new", "stored"}


def test_bands_name_counts(text):
  assert set(text.bands) == {2, 3}
  for found in text.bands.values():
    assert set(found) <= set(BANDS) and len(found) == len(text.origin)
  never = text.bands[3] == "0"
  assert (text.trigram_counts[never] == 0).all() and never.any()
  assert (text.trigram_counts[text.bands[3] == "2-3"] >= 2).all()
  # A trigram is never more frequent than the bigram that it ends with.
  order = {band: i for i, band in enumerate(BANDS)}
  places = [[order[b] for b in text.bands[n]] for n in (3, 2)]
  assert all(a <= b for a, b in zip(*places))
