"""Where documents come from: a folder of text files, or a TFDS dataset.

A source is a description (what determines its documents, for the digest of
prepared data) and a function that reads them, each time in the same order.
Every document lies in one of two splits, `train` and `validation`, fixed by a
hash: of the file's relative path, or of an example's text. Where that leaves a
split without text, as with a single file, the end of every document is held out
instead (`hold_out_ends`).
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Collection, Iterator
from typing import Any

from engram_jax.data import folders
from engram_jax.errors import InputError, require

SPLITS = ("train", "validation")
#: Not the standard library's own sources: installed packages and tests.
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests")
CONNECT_SECONDS, READ_SECONDS = 5, 60


@dataclasses.dataclass(frozen=True)
class Document:
  """One text.

  Attributes:
    name: relative path of its file, or split and index of its example.
    split: one of `SPLITS`.
    text: None if it is not valid UTF-8.
  """

  name: str
  split: str
  text: str | None


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Documents, and what determines them.

  Attributes:
    name: short, for the name of a folder.
    identity: JSON-able; equal identities mean equal documents.
    documents: reads them all, always in the same order.
    total_bytes: about how many bytes they are in all, for showing progress.
    left_out: what of the folder is no document, in one line.
  """

  name: str
  identity: Any
  documents: Callable[[], Iterator[Document]]
  total_bytes: int | None = None
  left_out: str = ""


def split_of(key: bytes, *, validation_percent: int) -> str:
  """The split of a document: the same on every machine and in every run.

  Args:
    key: what names the document, in bytes.
    validation_percent: share of documents held out, in percent.
  """
  number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
  return "validation" if number % 100 < validation_percent else "train"


def leaves_a_split_empty(source: TextSource) -> bool:
  """Whether one split has all the text; reads until both have some."""
  seen = set()
  for document in source.documents():
    if document.text:
      seen.add(document.split)
    if len(seen) == len(SPLITS):
      return False
  return bool(seen)


def hold_out_ends(source: TextSource, *, validation_percent: int) -> TextSource:
  """The same documents, each cut in two: its end is held out.

  Args:
    source: any.
    validation_percent: share of every document's characters held out. The cut
      is moved to the end of a line, or else of a word, if there is one near.
  """

  def documents() -> Iterator[Document]:
    for document in source.documents():
      if not document.text:
        yield document
        continue
      cut = _place_to_cut(document.text, validation_percent)
      parts = (document.text[:cut], document.text[cut:])
      for split, text in zip(SPLITS, parts):
        if text:
          yield Document(document.name, split, text)

  return dataclasses.replace(source, documents=documents)


def _place_to_cut(text: str, validation_percent: int) -> int:
  """Length of the part to train on."""
  target = max(len(text) * (100 - validation_percent) // 100, 1)
  lowest = target - min(target - 1, (len(text) - target) // 2)
  line = text.rfind("\n", lowest, target)
  if line >= 0:
    return line + 1
  word = text.rfind(" ", lowest, target)
  return word if word > 0 else target


def folder_source(
  folder: str,
  *,
  glob: str,
  validation_percent: int,
  exclude: Collection[pathlib.Path] = (),
) -> TextSource:
  """The text files of a folder and of the folders in it.

  Hidden files and folders and `__pycache__` are left out, and what a program of
  this library wrote (`folders.py`); links to folders are not followed.
  Documents come in the order of the hash of their paths, so that neighbours in
  the packed stream are unrelated, and the first windows of a split are a fair
  sample of it.

  Args:
    folder: its path; empty for the Python standard library's own sources,
      without installed packages and tests.
    glob: pattern for the end of a path, `*.txt` or `docs/*.md`.
    validation_percent: share of the files held out.
    exclude: folders to leave out, such as where prepared data are kept.

  Raises:
    InputError: no such folder, a pattern of another kind, no file that fits
      it, or something that cannot be read.
  """
  require(
    glob and "**" not in glob and not glob.startswith("/"),
    "glob",
    repr(glob),
    "a pattern for the end of a path, such as *.txt or docs/*.md; folders are "
    "searched to the bottom without **",
  )
  root = folders.expand("folder", folder or sysconfig.get_paths()["stdlib"])
  try:
    root = root.resolve(strict=True)
    is_folder = root.is_dir()
  except OSError as error:
    # A path that goes through a file or a closed folder, a loop, a long name.
    valid = f"an existing folder ({error.strerror})"
    raise InputError("folder", root, valid) from None
  except RuntimeError:  # before Python 3.13, a loop of links
    raise InputError("folder", root, "an existing folder (a loop)") from None
  require(is_folder, "folder", root, "an existing folder")
  never = (*folders.NEVER_TEXT, *(() if folder else NOT_LIBRARY))
  listing = folders.list_files(root, glob=glob, never=never, exclude=exclude)
  left_out = listing.describe()
  valid = f"a pattern that fits a file under {root}"
  valid += f" (left out: {left_out})" if left_out else ""
  require(listing.files, "glob", glob, valid)
  files = sorted(
    listing.files,
    key=lambda file: hashlib.sha256(os.fsencode(file[0])).digest(),
  )

  def documents() -> Iterator[Document]:
    for path, _, _ in files:
      split = split_of(os.fsencode(path), validation_percent=validation_percent)
      text = decode_text(_read(root / path))
      yield Document(folders.printable(path), split, text)

  return TextSource(
    # No longer than a file's name may be with the digest behind it.
    name=re.sub(r"[^\w.-]", "_", root.name)[:40] or "folder",
    identity=[
      "folder",
      folders.printable(os.fspath(root)),
      [(folders.printable(path), *rest) for path, *rest in files],
    ],
    documents=documents,
    total_bytes=sum(size for _, size, _ in files),
    left_out=left_out,
  )


def tfds_source(
  name: str, *, text_key: str, validation_percent: int, data_dir: pathlib.Path
) -> TextSource:
  """The examples of a registered TFDS dataset, read without TensorFlow.

  Its `train` split is used, and its `validation` split if it has one; if not,
  part of `train` is held out by the hash of the text, so that two equal texts
  are never on both sides. Other splits are not read.

  Args:
    name: as for `tfds.builder`, e.g. `"lm1b"` or `"wikipedia/20230601.en"`.
    text_key: the feature that holds the text.
    validation_percent: share held out of `train`.
    data_dir: where TFDS keeps datasets; one that is there already needs no
      network.

  Raises:
    InputError: no such dataset, it cannot be prepared (no network, say), it
      was prepared in a format without random access, or it has no `train`
      split or no such text feature.
  """
  builder = _prepared_builder(name, data_dir)
  splits = builder.info.splits
  require("train" in splits, "tfds_name", name, "a dataset with a train split")
  require(
    text_key in builder.info.features,
    "tfds_text_key",
    text_key,
    f"a feature of {name}: {', '.join(builder.info.features)}",
  )
  used = SPLITS if "validation" in splits else ("train",)

  def documents() -> Iterator[Document]:
    for split in used:
      for index, example in enumerate(_data_source(builder, name, split)):
        content = example[text_key]
        if not isinstance(content, (bytes, str)):
          found = type(content).__name__
          raise InputError("tfds_text_key", f"{text_key} ({found})", "a text")
        key = content if isinstance(content, bytes) else content.encode()
        side = split_of(key, validation_percent=validation_percent)
        side = split if len(used) == 2 else side
        yield Document(f"{split}[{index}]", side, decode_text(key))

  counts = {
    split: [splits[split].num_bytes, list(splits[split].shard_lengths)]
    for split in used
  }
  return TextSource(
    name=re.sub(r"[^\w.-]", "_", builder.name),
    identity=["tfds", builder.info.full_name, text_key, counts],
    documents=documents,
    total_bytes=sum(splits[split].num_bytes for split in used),
  )


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from making `path`; a killed one holds no lock.

  Raises:
    InputError: the folder in which it is to lie cannot be written to.
  """
  name = path.with_name(f".{path.name}.lock")
  try:
    try:
      file = open(name, "w")
    except PermissionError:
      file = open(name)  # another user's: it can be waited for all the same
  except OSError as error:
    valid = f"a folder that can be written to ({error.strerror})"
    raise InputError("data_dir", path.parent, valid) from None
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _read(path: pathlib.Path) -> bytes:
  """A file's bytes."""
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      # Its characters may take four times as much again.
      memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
      valid = (
        f"a file that fits into memory, below {memory // 4} bytes: it has "
      )
      valid += f"{size}; split it"
      require(size <= memory // 4, "folder", path, valid)
      return file.read()
  except OSError as error:
    valid = f"a readable file ({error.strerror})"
    raise InputError("folder", path, valid) from None


def decode_text(content: bytes) -> str | None:
  """The text of UTF-8 bytes; None for others."""
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError:
    return None


def _prepared_builder(name: str, data_dir: pathlib.Path) -> Any:
  """The TFDS builder `name` with its data on disk."""
  import tensorflow_datasets as tfds

  def make() -> Any:
    try:
      return tfds.builder(name, data_dir=data_dir)
    except Exception as error:
      raise InputError(
        "tfds_name",
        name,
        f"a dataset that TFDS knows or that lies in {data_dir} "
        f"({_first_line(error)})",
      ) from error

  builder = make()
  if builder.is_prepared():
    return builder
  with lock(data_dir / f"tfds-{builder.name}"), impatient_downloads():
    builder = make()  # sees what another process made meanwhile
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
      builder.download_and_prepare(
        file_format="array_record", download_config=config
      )
    except Exception as error:  # whatever another's builder may raise
      raise InputError(
        "tfds_name",
        name,
        f"a dataset that can be prepared here: one already in {data_dir}, or a "
        f"network to fetch it ({_first_line(error)})",
      ) from error
  return builder


def _data_source(builder: Any, name: str, split: str) -> Any:
  try:
    return builder.as_data_source(split)
  except NotImplementedError:
    raise InputError(
      "tfds_name",
      f"{name} in {builder.data_dir}, prepared as "
      f"{builder.info.file_format.value}",
      "array_record, which is read without TensorFlow",
    ) from None


@contextlib.contextmanager
def impatient_downloads() -> Iterator[None]:
  """Makes TFDS give up at the first failed connection.

  Its default is ten retries with growing pauses and no timeout: minutes of
  silence on a machine without a network.
  """
  from tensorflow_datasets.core.download import downloader

  retries, open_url = downloader.MAX_RETRIES, downloader._open_with_requests
  downloader.MAX_RETRIES = 0
  downloader._open_with_requests = functools.partial(
    open_url, timeout=(CONNECT_SECONDS, READ_SECONDS)
  )
  try:
    yield
  finally:
    downloader.MAX_RETRIES = retries
    downloader._open_with_requests = open_url


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"[:160]
