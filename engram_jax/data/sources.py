"""Where documents come from: a folder of text files, or a TFDS dataset.

A source is a description (what determines its documents, for the digest of
prepared data) and a function that reads them, each time in the same order.
Every document lies in one of two splits, `train` and `validation`, fixed by a
hash: of the file's relative path, or of an example's text.
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
from collections.abc import Callable, Iterator
from typing import Any

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
  """

  name: str
  identity: Any
  documents: Callable[[], Iterator[Document]]


def split_of(key: bytes, *, validation_percent: int) -> str:
  """The split of a document: the same on every machine and in every run."""
  number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
  return "validation" if number % 100 < validation_percent else "train"


def folder_source(
  folder: str, *, glob: str, validation_percent: int, exclude: pathlib.Path
) -> TextSource:
  """The text files of a folder and of the folders in it.

  Hidden files and folders and `__pycache__` are left out; links to folders are
  not followed. Documents come in the order of the hash of their paths, so that
  neighbours in the packed stream are unrelated, and the first windows of a
  split are a fair sample of it.

  Args:
    folder: its path; empty for the Python standard library's own sources,
      without installed packages and tests.
    glob: pattern for the end of a path, `*.txt` or `docs/*.md`.
    validation_percent: share of the files held out.
    exclude: a folder to leave out, where prepared data are kept.

  Raises:
    InputError: no such folder, a pattern of another kind, or no file fits it.
  """
  require(
    glob and "**" not in glob and not glob.startswith("/"),
    "glob",
    repr(glob),
    "a pattern for the end of a path, such as *.txt or docs/*.md; folders are "
    "searched to the bottom without **",
  )
  root = pathlib.Path(folder or sysconfig.get_paths()["stdlib"]).expanduser()
  require(root.is_dir(), "folder", root, "an existing folder")
  leave_out = ("__pycache__", *(() if folder else NOT_LIBRARY))
  paths = [
    path
    for path in _walk(root.resolve(), leave_out, exclude.resolve())
    if pathlib.PurePosixPath(path).match(glob)
  ]
  require(paths, "glob", glob, f"a pattern that fits a file under {root}")
  paths.sort(key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
  listing = []
  for path in paths:
    status = (root / path).stat()
    listing.append((_printable(path), status.st_size, status.st_mtime_ns))

  def documents() -> Iterator[Document]:
    for path in paths:
      split = split_of(os.fsencode(path), validation_percent=validation_percent)
      try:
        content = (root / path).read_bytes()
      except OSError as error:
        raise InputError(
          "folder", root / path, f"a readable file ({error.strerror})"
        ) from None
      yield Document(_printable(path), split, _decode(content))

  return TextSource(
    name=re.sub(r"[^\w.-]", "_", root.resolve().name) or "folder",
    identity=["folder", _printable(os.fspath(root.resolve())), listing],
    documents=documents,
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
        yield Document(f"{split}[{index}]", side, _decode(key))

  counts = {
    split: [splits[split].num_bytes, list(splits[split].shard_lengths)]
    for split in used
  }
  return TextSource(
    name=re.sub(r"[^\w.-]", "_", builder.name),
    identity=["tfds", builder.info.full_name, text_key, counts],
    documents=documents,
  )


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from making `path`; a killed one holds no lock."""
  with open(path.with_name(f"{path.name}.lock"), "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _walk(
  root: pathlib.Path, leave_out: tuple[str, ...], exclude: pathlib.Path
) -> Iterator[str]:
  """Relative posix paths of the files under `root`."""
  for base, folders, files in os.walk(root):
    here = pathlib.Path(base)
    folders[:] = [
      folder
      for folder in folders
      if not folder.startswith(".")
      and folder not in leave_out
      and here / folder != exclude
    ]
    for file in files:
      if not file.startswith(".") and (here / file).is_file():
        yield (here / file).relative_to(root).as_posix()


def _decode(content: bytes) -> str | None:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError:
    return None


def _printable(path: str) -> str:
  # A file's name need not be UTF-8; what is stored about it must be.
  return os.fsencode(path).decode("utf-8", "backslashreplace")


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
  with lock(data_dir / f"tfds-{builder.name}"), _impatient_downloads():
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
def _impatient_downloads() -> Iterator[None]:
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
