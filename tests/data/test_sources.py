"""Tests of the sources of documents: folders and TFDS datasets."""

import pathlib
import time

import pytest
from tensorflow_datasets.core.download import downloader

from engram_jax.data import sources
from engram_jax.errors import InputError

PERCENT = 20


def folder_source(folder, glob="*.py", exclude="/nonexistent"):
  return sources.folder_source(
    str(folder),
    glob=glob,
    validation_percent=PERCENT,
    exclude=[pathlib.Path(exclude)],
  )


def tfds_source(name, data_dir, text_key="text"):
  return sources.tfds_source(
    name, text_key=text_key, validation_percent=PERCENT, data_dir=data_dir
  )


def splits(source):
  return {document.name: document.split for document in source.documents()}


def test_split_is_by_file_and_stable(tmp_path):
  for i in range(200):
    (tmp_path / f"{i}.py").write_text("text")
  before = splits(folder_source(tmp_path))
  assert 20 <= list(before.values()).count("validation") <= 60
  # Neither other files nor other contents move a file to the other side.
  for i in range(0, 200, 2):
    (tmp_path / f"{i}.py").unlink()
    (tmp_path / f"{i + 1}.py").write_text("other text")
  after = splits(folder_source(tmp_path))
  assert len(after) == 100
  assert after == {name: before[name] for name in after}


def test_split_is_the_same_for_ever():
  # Literal values: a change would leak validation files into training.
  keys = (b"os.py", b"json/decoder.py", b"a/b/c.txt", b"ast.py", b"re.py")
  found = [sources.split_of(key, validation_percent=50) for key in keys]
  assert found == ["train", "train", "train", "train", "validation"]


def test_which_files_and_in_which_order(tmp_path):
  for name in ("a.py", "b.txt", "deep/er/c.py", "docs/d.md", "x/docs/e.md"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  for name in (".hidden/f.py", ".g.py", "__pycache__/h.py", "data/i.py"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  (tmp_path / "broken.py").symlink_to("nowhere")
  source = folder_source(tmp_path, exclude=tmp_path / "data")
  names = [document.name for document in source.documents()]
  assert sorted(names) == ["a.py", "deep/er/c.py"]
  assert names == [document.name for document in source.documents()]
  docs = splits(folder_source(tmp_path, glob="docs/*.md"))
  assert sorted(docs) == ["docs/d.md", "x/docs/e.md"]


def test_texts_are_not_touched(tmp_path):
  (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
  (tmp_path / "b.py").write_bytes(b"caf\xe9")
  (tmp_path / "c.py").write_bytes(b"")
  texts = {d.name: d.text for d in folder_source(tmp_path).documents()}
  assert texts == {"a.py": "\ufeffa\r\nb\rc\n", "b.py": None, "c.py": ""}


def test_identity_follows_the_files(tmp_path):
  (tmp_path / "a.py").write_text("text")
  first = folder_source(tmp_path).identity
  assert folder_source(tmp_path).identity == first
  (tmp_path / "a.py").write_text("texts")
  second = folder_source(tmp_path).identity
  (tmp_path / "b.py").write_text("text")
  third = folder_source(tmp_path).identity
  assert first != second != third != first


def test_a_missing_folder_and_a_glob_that_fits_nothing(tmp_path):
  with pytest.raises(InputError, match=r"^folder: .*/none; valid: an existing"):
    folder_source(tmp_path / "none")
  with pytest.raises(InputError, match=r"^glob: \*.rs; .* fits a file under /"):
    folder_source(tmp_path, glob="*.rs")
  for glob in ("**/*.py", "", "/etc/*"):
    with pytest.raises(InputError, match=r"^glob: "):
      folder_source(tmp_path, glob=glob)


def test_standard_library_is_the_default():
  names = splits(folder_source(""))
  assert {"os.py", "json/decoder.py"} <= set(names)
  parts = {part for name in names for part in name.split("/")}
  assert not {"site-packages", "test", "tests", "__pycache__"} & parts


def test_registered_dataset_without_validation_split(tmp_path):
  source = tfds_source("tiny_stories", tmp_path)
  documents = list(source.documents())
  assert sorted(d.text for d in documents) == sorted(
    f"train story {i // 2}, ä" for i in range(50)
  )
  sides = {}
  for document in documents:
    assert sides.setdefault(document.text, document.split) == document.split
  assert set(sides.values()) == set(sources.SPLITS)
  again = tfds_source("tiny_stories", tmp_path)
  assert again.identity == source.identity
  assert list(again.documents()) == documents


def test_registered_dataset_with_validation_split(tmp_path):
  source = tfds_source("tiny_stories_with_validation", tmp_path)
  for document in source.documents():
    assert document.text.startswith(document.split)


def test_prepared_dataset_needs_no_code_and_no_network(
  tmp_path, monkeypatch, unregistered_builder
):
  unregistered_builder(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  monkeypatch.setattr(
    sources, "impatient_downloads", lambda: pytest.fail("no download")
  )
  assert len(list(tfds_source("only_here", tmp_path).documents())) == 50


def test_unavailable_datasets_fail_fast_in_one_line(tmp_path):
  retries = downloader.MAX_RETRIES
  start = time.monotonic()
  for name, message in (
    ("no_such_dataset", "DatasetNotFoundError"),
    ("bad name", "ValueError"),
    ("tiny_download", "a network to fetch it .ConnectionError"),
  ):
    with pytest.raises(
      InputError, match=f"^tfds_name: {name}; .*{message}"
    ) as e:
      tfds_source(name, tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
  assert time.monotonic() - start < 10
  assert downloader.MAX_RETRIES == retries > 0


def test_datasets_that_do_not_fit(tmp_path):
  with pytest.raises(
    InputError, match=r"^tfds_text_key: words; .*: text, number"
  ):
    tfds_source("tiny_stories", tmp_path, text_key="words")
  with pytest.raises(InputError, match=r"^tfds_text_key: number .int"):
    list(tfds_source("tiny_stories", tmp_path, text_key="number").documents())
  with pytest.raises(InputError, match=r"^tfds_name: tiny_test_only; .* train"):
    tfds_source("tiny_test_only", tmp_path)
