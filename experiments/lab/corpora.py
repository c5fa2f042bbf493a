"""The text that the studies train on, gathered from this machine.

`code` is what they train on: every distinct Python source of the standard
library (tests included) and of the installed packages. `prose` is the second
corpus, which is never trained on: the packages' READMEs and documentation. Both
are written to a folder named by a digest of their contents, with a list of the
files in `corpus.json`: another machine has other packages, and other digests.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator

from engram_jax import progress
from engram_jax.data.sources import decode_text
from engram_jax.errors import require
from engram_jax.files import write_whole

#: Endings of the files of each corpus.
CORPORA = {"code": (".py",), "prose": (".md", ".rst", "METADATA")}
LARGEST_FILE = 1_000_000
SMALLEST_FILE = 200


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A folder of text files.

  Attributes:
    name: name and digest of its contents.
    folder: where it lies; the files end in `.txt`.
    files: number of files.
    bytes: their size.
  """

  name: str
  folder: pathlib.Path
  files: int
  bytes: int


def gather(name: str, *, root: pathlib.Path, at_most: int) -> Corpus:
  """Writes a corpus, or finds it written.

  Args:
    name: `code` or `prose`.
    root: folder of the corpora.
    at_most: bytes at which it ends; which files are in it then follows the
      hashes of their contents.

  Raises:
    InputError: no such corpus, or no text on this machine.
  """
  valid = f"one of {', '.join(CORPORA)}"
  require(name in CORPORA, "corpus", name, valid)
  # The list is made once: packages installed later change no running study.
  pointer = root / f"{name}-{at_most}.json"
  if pointer.exists():
    return _open(root / json.loads(pointer.read_text())["name"])
  with progress.waiting(f"gathering the text: {name}"):
    texts = _distinct_texts(CORPORA[name])
  chosen, size = {}, 0
  for digest in sorted(texts):
    if size >= at_most:
      break
    chosen[digest] = texts[digest]
    size += os.path.getsize(texts[digest])
  require(chosen, "corpus", name, "a machine with such files")
  listing = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
  folder = root / f"{name}-{listing[:12]}"
  if not folder.exists():
    _write(folder, chosen)
  write_whole(pointer, json.dumps({"name": folder.name}))
  return _open(folder)


def write_corpus(name: str, texts: Iterator[str], *, root: pathlib.Path):
  """A corpus of texts that are made here, such as `data.synthetic`'s.

  Args:
    name: what to call it.
    texts: one per document; no two alike.
    root: folder of the corpora.

  Returns:
    A `Corpus`, named by `name` and a digest of the texts.
  """
  contents = [text.encode() for text in texts]
  require(contents, "texts", "none", "one or more")
  digests = [hashlib.sha256(content).hexdigest() for content in contents]
  listing = hashlib.sha256("\n".join(digests).encode()).hexdigest()
  folder = root / f"{name}-{listing[:12]}"
  if not folder.exists():
    _write(folder, dict(zip(digests, contents)))
  return _open(folder)


def _distinct_texts(endings: tuple[str, ...]) -> dict[str, str]:
  """Path of each distinct text, by the digest of its contents."""
  paths = sysconfig.get_paths()
  found = {}
  for top in sorted({paths["stdlib"], paths["purelib"], paths["platlib"]}):
    for folder, _, names in os.walk(top):
      for name in names:
        path = os.path.join(folder, name)
        if not name.endswith(endings) or os.path.islink(path):
          continue
        if not SMALLEST_FILE <= os.path.getsize(path) <= LARGEST_FILE:
          continue
        content = pathlib.Path(path).read_bytes()
        if decode_text(content) is not None:
          found[hashlib.sha256(content).hexdigest()] = path
  return found


def _write(folder: pathlib.Path, contents: dict[str, str | bytes]) -> None:
  """The files, by the digests of what they hold; whole or not at all."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  made = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
  size = 0
  for digest, content in contents.items():
    if isinstance(content, str):
      content = pathlib.Path(content).read_bytes()
    path = made / "text" / digest[:2] / f"{digest}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    size += len(content)
  about = {"files": len(contents), "bytes": size, "digests": [*contents]}
  (made / "corpus.json").write_text(json.dumps(about))
  try:
    made.rename(folder)
  except OSError:  # another process was sooner
    shutil.rmtree(made)
    if not folder.exists():
      raise


def _open(folder: pathlib.Path) -> Corpus:
  about = json.loads((folder / "corpus.json").read_text())
  return Corpus(folder.name, folder / "text", about["files"], about["bytes"])
