"""A small corpus, prepared once, and TFDS datasets for the tests.

The library is imported inside the fixtures: pytest may load this file before
the hook that checks the annotations is in place.
"""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

WORDS = "def return value if not None else self import for in range".split()


class TinyStories(tfds.core.GeneratorBasedBuilder):
  """A registered text dataset without a validation split."""

  VERSION = tfds.core.Version("1.0.0")
  SPLITS = ("train", "test")

  def _info(self):
    features = {"text": tfds.features.Text(), "number": np.int64}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self.SPLITS}

  def _generate_examples(self, split):
    for i in range(50):
      # Every text twice: both must come to one side.
      yield i, {"text": f"{split} story {i // 2}, ä", "number": i}


class TinyStoriesWithValidation(TinyStories):
  """One that holds out examples itself."""

  SPLITS = ("train", "validation")


class TinyTestOnly(TinyStories):
  SPLITS = ("test",)


class TinyDownload(TinyStories):
  """One that needs the network: port 9 of this machine, where nobody is."""

  def _split_generators(self, dl_manager):
    dl_manager.download("http://127.0.0.1:9/stories.txt")


class OnlyHere(TinyStories, skip_registration=True):
  """One that TFDS does not know by name."""


@pytest.fixture
def unregistered_builder():
  return OnlyHere


def _write_corpus(folder: pathlib.Path, *, files: int, seed: int = 0) -> None:
  rng = np.random.default_rng(seed)
  for number in range(files):
    path = folder / f"package{number % 3}" / f"module{number}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = rng.choice(WORDS, size=int(rng.integers(1, 400)))
    path.write_text(f"# äöü 漢字 {number}\n" + " ".join(words) + "\n")


@pytest.fixture(scope="session")
def write_corpus():
  """Writes text files of different lengths."""
  return _write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("corpus")
  _write_corpus(folder, files=40)
  # Longer than a piece.
  (folder / "long.py").write_text(" ".join(f"word{i}" for i in range(5000)))
  return folder


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory):
  from engram_jax.run_config import DataConfig

  return DataConfig(
    folder=str(corpus),
    data_dir=str(tmp_path_factory.mktemp("data")),
    vocab_size=300,
    validation_percent=20,
  )


@pytest.fixture(scope="session")
def prepared(config):
  from engram_jax.data.prepared import prepare

  return prepare(config)
