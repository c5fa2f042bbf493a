"""Tests of the folder: splits as promised, whole, and never mixed up."""

import dataclasses
import json

import pytest

from engram_jax.data.prepared import prepare
from engram_jax.data.sources import Document, folder_source
from engram_jax.data.synthetic import facts
from engram_jax.data.synthetic.folder import write_folder
from engram_jax.errors import InputError
from engram_jax.run_config import DataConfig

CONFIG = facts.FactsConfig(entities=8, attributes=1, frequencies=(2,), seed=7)


def write(path, config=CONFIG, **options):
  return write_folder(
    path, facts.documents(config), configs=[config], **options
  )


@pytest.mark.parametrize("percent", [5, 40])
def test_documents_come_back_in_their_splits(tmp_path, percent):
  folder = write(tmp_path / "x" / "facts", validation_percent=percent)
  source = folder_source(str(folder), glob="*.txt", validation_percent=percent)
  found = {(x.split, x.text) for x in source.documents()}
  assert found == {(x.split, x.text) for x in facts.documents(CONFIG)}


def test_a_run_reads_the_folder(tmp_path):
  folder = write(tmp_path / "facts")
  config = DataConfig(
    folder=str(folder), glob="*.txt", data_dir=str(tmp_path), vocab_size=300
  )
  prepared = prepare(config)
  counts = {name: x.documents for name, x in prepared.splits.items()}
  documents = [x.split for x in facts.documents(CONFIG)]
  assert counts == {name: documents.count(name) for name in counts}


def test_the_seed_is_recorded_and_equal_configs_are_not_written_again(
  tmp_path,
):
  folder = write(tmp_path / "facts")
  described = json.loads((folder / "synthetic.json").read_text())
  assert described["configs"][0]["seed"] == 7

  def refuse():
    raise AssertionError("read")
    yield

  again = write_folder(folder, refuse(), configs=[CONFIG])
  assert again == folder


def test_a_folder_of_other_content_is_refused(tmp_path):
  folder = write(tmp_path / "facts")
  with pytest.raises(InputError, match="json of the same configs"):
    write(folder, dataclasses.replace(CONFIG, seed=8))
  with pytest.raises(InputError, match="json of the same configs"):
    write(tmp_path)


@pytest.mark.parametrize(
  "documents",
  [
    [Document("a", "train", "x"), Document("a", "train", "y")],
    [Document("a", "test", "x")],
    [Document("a", "train", "")],
  ],
)
def test_nothing_is_left_of_a_folder_that_was_refused(tmp_path, documents):
  with pytest.raises(InputError):
    write_folder(tmp_path / "x", documents, configs=[])
  assert not list(tmp_path.iterdir())
