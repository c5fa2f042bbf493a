"""Corpora: each text once, whole folders, digests of what is in them."""

import pytest

from engram_jax.errors import InputError
from experiments.lab import corpora


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A machine with three distinct sources, one of them twice."""
  folder = tmp_path / "lib"
  (folder / "package").mkdir(parents=True)
  for name, text in {
    "a.py": "a" * 300,
    "package/same.py": "a" * 300,
    "package/b.py": "b" * 400,
    "c.py": "c" * 500,
    "short.py": "s",
    "readme.md": "r" * 300,
  }.items():
    (folder / name).write_text(text)
  (folder / "broken.py").write_bytes(b"\xff" * 300)
  paths = dict.fromkeys(("stdlib", "purelib", "platlib"), str(folder))
  monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: paths)
  return folder


def read(corpus):
  return sorted(path.read_text() for path in corpus.folder.rglob("*.txt"))


def test_each_text_is_there_once(machine, tmp_path):
  corpus = corpora.gather("code", root=tmp_path / "out", at_most=10**6)
  assert read(corpus) == ["a" * 300, "b" * 400, "c" * 500]
  assert corpus.files == 3 and corpus.bytes == 1200
  assert corpus.name.startswith("code-")
  prose = corpora.gather("prose", root=tmp_path / "out", at_most=10**6)
  assert read(prose) == ["r" * 300]


def test_what_was_gathered_stays_as_it_is(machine, tmp_path):
  first = corpora.gather("code", root=tmp_path / "out", at_most=10**6)
  (machine / "d.py").write_text("d" * 300)
  assert corpora.gather("code", root=tmp_path / "out", at_most=10**6) == first
  other = corpora.gather("code", root=tmp_path / "new", at_most=10**6)
  assert other.name != first.name and other.files == 4
  assert corpora.gather("code", root=tmp_path / "few", at_most=1).files == 1


def test_a_corpus_of_made_texts(tmp_path):
  corpus = corpora.write_corpus("facts", iter(["one", "two"]), root=tmp_path)
  assert read(corpus) == ["one", "two"]
  again = corpora.write_corpus("facts", iter(["one", "two"]), root=tmp_path)
  assert again == corpus
  with pytest.raises(InputError, match="one of code, prose"):
    corpora.gather("music", root=tmp_path, at_most=1)
