"""Tests of preparing: what is built, reused, refused, and survives a kill."""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from engram_jax.data import prepared as lib
from engram_jax.data import sources
from engram_jax.data.prepared import prepare
from engram_jax.data.text_dataset import PIECE_TOKENS, read_index, read_pieces
from engram_jax.data.tokenizers import END_ID
from engram_jax.errors import InputError
from engram_jax.run_config import DataConfig


def texts_of(prepared, split):
  """The documents of a split, decoded from the pieces."""
  documents = []
  for piece in read_pieces(prepared.folder, splits=[split]):
    if piece["starts_document"]:
      documents.append((piece["document"].decode(), []))
    assert piece["document"].decode() == documents[-1][0]
    documents[-1][1].extend(piece["tokens"])
  for _, ids in documents:
    assert ids.index(END_ID) == len(ids) - 1
  return {name: prepared.tokenizer.decode(ids[:-1]) for name, ids in documents}


@pytest.fixture
def small_config(tmp_path, write_corpus):
  """Makes a config of a corpus of 12 files of its own."""

  def make(**changes):
    write_corpus(tmp_path / "corpus", files=12)
    fields = {
      "folder": str(tmp_path / "corpus"),
      "data_dir": str(tmp_path / "data"),
      "vocab_size": 260,
      "validation_percent": 40,
    }
    return DataConfig(**(fields | changes))

  return make


def built(tmp_path):
  """What lies in the data folder, but for the locks."""
  data = tmp_path / "data"
  return [path for path in data.iterdir() if path.suffix != ".lock"]


def test_every_document_comes_back_on_its_side(prepared, corpus):
  found = {}
  for split in sources.SPLITS:
    texts = texts_of(prepared, split)
    for name, text in texts.items():
      assert text == (corpus / name).read_text()
      expected = sources.split_of(name.encode(), validation_percent=20)
      assert split == expected
    info = prepared.splits[split]
    assert info.documents == len(texts) > 0
    assert info.text_bytes == sum(len(t.encode()) for t in texts.values())
    found |= texts
  names = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*.py")}
  assert set(found) == names


def test_index_fits_the_pieces(prepared):
  longest = 0
  for split, info in prepared.splits.items():
    pieces = list(read_pieces(prepared.folder, splits=[split]))
    ends, starts = read_index(prepared.folder, split)
    lengths = [len(piece["tokens"]) for piece in pieces]
    longest = max(longest, *lengths)
    np.testing.assert_array_equal(ends, np.cumsum(lengths))
    begins = ends - lengths
    flags = [piece["starts_document"] for piece in pieces]
    np.testing.assert_array_equal(starts, begins[flags])
    assert ends.dtype == starts.dtype == np.int64
    assert info.tokens == ends[-1]
    assert pieces[0]["tokens"].dtype == np.int32
  assert longest == PIECE_TOKENS  # the long document was cut


def test_tokenizer_is_trained_on_the_train_split_only(tmp_path, small_config):
  config = small_config(vocab_size=400)
  first = prepare(config)
  changed = 0
  for path in (tmp_path / "corpus").rglob("*.py"):
    name = path.relative_to(tmp_path / "corpus").as_posix()
    if sources.split_of(name.encode(), validation_percent=40) == "validation":
      path.write_text("quite another text " * 50)
      changed += 1
  second = prepare(config)
  assert changed and second.folder != first.folder
  assert second.tokenizer.to_str() == first.tokenizer.to_str()
  assert second.splits["train"] == first.splits["train"]
  assert second.splits["validation"] != first.splits["validation"]


def test_prepared_data_are_reused(prepared, config, monkeypatch):
  monkeypatch.setattr(
    lib, "build_folder", lambda *_: pytest.fail("built again")
  )
  again = prepare(config)
  assert again.folder == prepared.folder
  assert again.splits == prepared.splits
  assert again.tokenizer.to_str() == prepared.tokenizer.to_str()


def test_other_settings_are_other_data(prepared, config, tmp_path):
  for change in ({"vocab_size": 301}, {"validation_percent": 21}):
    other = prepare(dataclasses.replace(config, **change))
    assert other.folder != prepared.folder


def test_building_is_deterministic(prepared, config, tmp_path):
  other = prepare(dataclasses.replace(config, data_dir=str(tmp_path)))
  assert other.folder.parent != prepared.folder.parent
  assert other.folder.name == prepared.folder.name
  assert other.splits == prepared.splits


def test_existing_tokenizer_on_another_folder(prepared, tmp_path, small_config):
  config = small_config()
  path = prepared.tokenizer_path
  other = prepare(config, tokenizer_path=path)
  assert other.tokenizer.to_str() == prepared.tokenizer.to_str()
  assert other.folder != prepare(config).folder
  # The size that would have been trained says nothing then.
  same = prepare(
    dataclasses.replace(config, vocab_size=999), tokenizer_path=path
  )
  assert same.folder == other.folder
  texts = texts_of(other, "train")
  assert texts and all(
    text == (tmp_path / "corpus" / name).read_text()
    for name, text in texts.items()
  )


def test_a_split_without_documents(prepared, tmp_path, small_config):
  config = small_config(glob="module0.py")
  path = prepared.tokenizer_path
  result = prepare(config, tokenizer_path=path, both_splits=False)
  counts = sorted(info.documents for info in result.splits.values())
  assert counts == [0, 1]
  assert 0 in [info.tokens for info in result.splits.values()]


def one_file(tmp_path, text, **changes):
  folder = tmp_path / "one"
  folder.mkdir()
  (folder / "input.txt").write_bytes(text.encode())
  fields = {"vocab_size": 270, "validation_percent": 10} | changes
  return DataConfig(
    folder=str(folder), glob="*.txt", data_dir=str(tmp_path / "data"), **fields
  )


def test_of_one_file_the_end_is_held_out(tmp_path, caplog):
  lines = [f"line {i} of this text, all of them unlike\n" for i in range(400)]
  config = one_file(tmp_path, "".join(lines))
  prepared = prepare(config)
  assert prepared.ends_held_out
  train, held_out = (
    texts_of(prepared, split)["input.txt"] for split in sources.SPLITS
  )
  assert train + held_out == "".join(lines)
  assert train.endswith("\n") and held_out.splitlines(True)[-1] == lines[-1]
  assert 0.05 < len(held_out) / len(train + held_out) < 0.15
  assert "of each the last 10 % are held out" in caplog.text
  # The same at each start, which says so again.
  caplog.clear()
  assert prepare(config).splits == prepared.splits
  assert "of each the last 10 % are held out" in caplog.text
  # And the tokenizer is not trained on it.
  path = tmp_path / "one" / "input.txt"
  path.write_text(train + "§" * len(held_out))
  assert prepare(config).tokenizer.to_str() == prepared.tokenizer.to_str()


@pytest.mark.parametrize("text", ("ab", "a b", "\n" * 9, "x" * 999, "ä\r\nö"))
def test_something_of_any_text_is_held_out(tmp_path, text):
  prepared = prepare(one_file(tmp_path, text))
  parts = [texts_of(prepared, split)["input.txt"] for split in sources.SPLITS]
  assert all(parts) and "".join(parts) == text


def test_of_one_character_nothing_can_be_held_out(tmp_path):
  with pytest.raises(InputError, match=r"^folder: .*/one; .* one character"):
    prepare(one_file(tmp_path, "a"))


def test_files_on_one_side_alone_are_cut_too(tmp_path, small_config):
  """Two files of which the hash holds out both, or one that is no text."""
  config = small_config(validation_percent=99)
  assert prepare(config).ends_held_out
  for percent in (5, 40):
    other = small_config(validation_percent=percent)
    names = [path.name for path in pathlib.Path(other.folder).rglob("*.py")]
    prepared = prepare(other)
    sizes = [info.documents for info in prepared.splits.values()]
    expected = 2 * len(names) if prepared.ends_held_out else len(names)
    assert sum(sizes) == expected and all(sizes)


def test_a_small_registered_dataset_is_cut(tmp_path):
  config = DataConfig(
    tfds_name="tiny_stories",
    data_dir=str(tmp_path),
    vocab_size=300,
    validation_percent=1,
  )
  prepared = prepare(config)
  assert prepared.ends_held_out
  counts = [info.documents for info in prepared.splits.values()]
  assert counts == [50, 50]


def test_outputs_in_the_folder_change_nothing(tmp_path, small_config, caplog):
  """A run's folder, prepared text and a run that is about to begin."""
  config = small_config(glob="*")
  first = prepare(config)
  corpus = tmp_path / "corpus"
  inside = dataclasses.replace(config, data_dir=str(corpus / "data"))
  assert prepare(inside).splits == first.splits
  (corpus / "runs" / "a").mkdir(parents=True)
  (corpus / "runs" / "a" / "notes.txt").write_text("not known as a run's yet")
  again = prepare(inside, exclude=[corpus / "runs" / "a"])
  assert again.splits == first.splits
  assert "prepared text: data" not in caplog.text  # it is the program's own
  assert "the program's own folder: data and 1 more" in caplog.text
  caplog.clear()
  (corpus / "runs" / "a" / "metrics.jsonl").write_text("{}")
  (corpus / "runs" / "a" / "config.json").write_text("{}")
  assert prepare(config).splits == first.splits
  assert "the folder of a run: runs/a" in caplog.text
  assert "prepared text: data/" in caplog.text


def test_damaged_prepared_text_is_one_line(tmp_path, small_config):
  config = small_config()
  folder = prepare(config).folder
  whole = (folder / "prepared.json").read_text()
  for content in ("", whole[:50], "[]", "{}"):
    (folder / "prepared.json").write_text(content)
    with pytest.raises(InputError, match=r"^data_dir: .*its folder is removed"):
      prepare(config)


def test_files_that_are_no_text_are_counted(tmp_path, caplog, small_config):
  config = small_config()
  (tmp_path / "corpus" / "latin.py").write_bytes(b"caf\xe9 " * 100)
  (tmp_path / "corpus" / "empty.py").write_bytes(b"")
  prepared = prepare(config)
  assert prepared.skipped == ("latin.py",)
  assert "1 files are not valid UTF-8 and were skipped" in caplog.text
  assert prepared.empty == 1
  assert sum(info.documents for info in prepared.splits.values()) == 12


def test_a_small_vocabulary_is_not_hidden(tmp_path, small_config):
  prepared = prepare(small_config(vocab_size=8192))
  assert prepared.vocab_size == prepared.tokenizer.get_vocab_size() < 2000


def test_registered_dataset(tmp_path):
  config = DataConfig(
    tfds_name="tiny_stories",
    data_dir=str(tmp_path),
    vocab_size=300,
    validation_percent=20,
  )
  prepared = prepare(config)
  assert sum(info.documents for info in prepared.splits.values()) == 50
  assert "train story 7, ä" in {
    *texts_of(prepared, "train").values(),
    *texts_of(prepared, "validation").values(),
  }
  assert prepare(config).folder == prepared.folder


def test_standard_library(tmp_path):
  prepared = prepare(
    DataConfig(glob="j*/*.py", data_dir=str(tmp_path), vocab_size=512)
  )
  assert prepared.folder.name.startswith("python3")
  assert prepared.splits["train"].tokens > 5_000
  assert prepared.vocab_size == 512


def test_empty_corpora_are_refused(tmp_path, small_config):
  config = small_config()
  empty = tmp_path / "empty"
  empty.mkdir()
  (empty / "a.py").write_text("")
  (empty / "b.py").write_bytes(b"\xff")
  message = "^folder: .*/empty; valid: a corpus with text in it: 1 doc.* 1 are"
  with pytest.raises(InputError, match=message):
    prepare(dataclasses.replace(config, folder=str(empty)))
  for folder, field in (("none", "folder"), ("nothing", "glob")):
    (tmp_path / "nothing").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=f"^{field}: "):
      prepare(dataclasses.replace(config, folder=str(tmp_path / folder)))
  assert built(tmp_path) == []


def test_all_documents_held_out_is_refused(tmp_path, small_config):
  config = small_config(validation_percent=99, glob="module1.py")
  with pytest.raises(
    InputError, match=r"^validation_percent: 99; .* all 1 fall"
  ):
    prepare(config, both_splits=False)


def test_data_dir_that_cannot_be_made(tmp_path, small_config):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"^data_dir: "):
    prepare(small_config(data_dir=str(tmp_path / "file" / "data")))


@pytest.mark.parametrize("stage", ("write_dataset", "write_index"))
def test_a_failed_build_leaves_nothing(
  tmp_path, monkeypatch, stage, small_config
):
  config = small_config()
  real = getattr(lib, stage)

  def fail(*args, **kwargs):
    real(*args, **kwargs)
    raise RuntimeError("midway")

  monkeypatch.setattr(lib, stage, fail)
  with pytest.raises(RuntimeError, match="midway"):
    prepare(config)
  assert built(tmp_path) == []
  monkeypatch.undo()
  assert prepare(config).splits["train"].tokens > 0


KILLED = """
  import os, pathlib, signal, sys
  from engram_jax.run_config import DataConfig
  from engram_jax.data import sources
  from engram_jax.data.prepared import prepare

  config = DataConfig(folder=sys.argv[1], data_dir=sys.argv[2], vocab_size=260)
  real = sources.decode_text

  def decode(content):
    # While what was read is written.
    if list(pathlib.Path(sys.argv[2]).glob(".*.building/tokenizer.json")):
      os.kill(os.getpid(), signal.SIGKILL)
    return real(content)

  sources.decode_text = decode
  prepare(config)
"""


def test_a_killed_build_is_not_read_and_not_in_the_way(tmp_path, small_config):
  config = small_config(validation_percent=5)
  process = subprocess.run(
    [
      sys.executable,
      "-c",
      textwrap.dedent(KILLED),
      config.folder,
      config.data_dir,
    ],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
  )
  assert process.returncode == -signal.SIGKILL, process.stderr.decode()
  (left,) = built(tmp_path)
  assert left.suffix == ".building"
  assert (left / "tokenizer.json").exists()
  prepared = prepare(config)
  assert built(tmp_path) == [prepared.folder]
  assert sum(info.documents for info in prepared.splits.values()) == 12


def test_builders_of_the_same_data_wait_for_each_other(
  tmp_path, monkeypatch, small_config
):
  config = small_config()
  real, builds, results = lib.build_folder, [], []

  def build(*args):
    builds.append(1)
    real(*args)

  monkeypatch.setattr(lib, "build_folder", build)
  threads = [
    threading.Thread(target=lambda: results.append(prepare(config)))
    for _ in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(builds) == 1
  assert len({result.folder for result in results}) == 1 and len(results) == 3


NO_TENSORFLOW = """
  import socket, sys

  def refuse(*args, **kwargs):
    raise AssertionError("a connection")

  socket.socket.connect = refuse
  socket.getaddrinfo = refuse
  from engram_jax.run_config import DataConfig
  from engram_jax.data.pipeline import batches
  from engram_jax.data.prepared import prepare

  prepared = prepare(
    DataConfig(folder=sys.argv[1], data_dir=sys.argv[2], vocab_size=260)
  )
  next(iter(batches(prepared, "train", seq_len=8, batch_size=2)))
  wrong = [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch")]
  assert not wrong, wrong
"""


def test_no_tensorflow_and_no_connection(tmp_path, small_config):
  config = small_config()
  subprocess.run(
    [
      sys.executable,
      "-c",
      textwrap.dedent(NO_TENSORFLOW),
      config.folder,
      config.data_dir,
    ],
    cwd=pathlib.Path(__file__).parents[2],
    check=True,
  )
