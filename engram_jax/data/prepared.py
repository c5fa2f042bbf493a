"""`prepare`: from a `DataConfig` to tokens on disk, once.

Everything that belongs together lies in one folder of `data_dir`:

  NAME-DIGEST/
    text_dataset/1.0.0/    the pieces (`text_dataset.py`)
    index-SPLIT.npz        where pieces end and documents start in the stream
    tokenizer.json         trained on the train split, or the one that was given
    prepared.json          counts and digests

What is there is only read: it may be another user's.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import tokenizers
from absl import logging

from engram_jax.data import folders, sources
from engram_jax.data.text_dataset import (
  TextDataset,
  damaged,
  read_index,
  write_dataset,
  write_index,
)
from engram_jax.data.tokenizers import (
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)
from engram_jax.errors import InputError, require
from engram_jax.progress import counting
from engram_jax.run_config import DataConfig

#: Of the layout above; part of the digest, so that old folders are not read.
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class SplitInfo:
  """What a split holds.

  Attributes:
    documents: files (or examples) with text in them.
    text_bytes: length of their texts in UTF-8.
    tokens: length of the stream, the documents' ends included.
    digest: sha256 of the stream, tokens and document starts: what a checkpoint
      compares to know that it continues on the same data.
  """

  documents: int
  text_bytes: int
  tokens: int
  digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
  """Tokenised documents on disk.

  Attributes:
    folder: where they are.
    tokenizer: the one they were encoded with.
    tokenizer_path: its file.
    splits: `train` and `validation`; either may be empty, with 0 tokens.
    skipped: names of the documents that are not valid UTF-8.
    empty: number of documents without any text, which are left out.
    ends_held_out: whether the validation split is the end of every document,
      as there are too few documents to hold some of them out.
  """

  folder: pathlib.Path
  tokenizer: tokenizers.Tokenizer
  tokenizer_path: pathlib.Path
  splits: dict[str, SplitInfo]
  skipped: tuple[str, ...]
  empty: int
  ends_held_out: bool = False

  @property
  def vocab_size(self) -> int:
    """Number of token ids; a small corpus gives fewer than asked for."""
    return self.tokenizer.get_vocab_size()


def prepare(
  config: DataConfig,
  *,
  tokenizer_path: str | os.PathLike[str] | None = None,
  exclude: Iterable[str | os.PathLike[str]] = (),
  both_splits: bool = True,
  progress: bool = False,
) -> PreparedData:
  """Makes tokens of the texts that `config` names, or finds them made.

  The result lies in a folder of `config.data_dir`, named by a digest of what
  determines it: the list of files with their sizes and times (or the TFDS
  dataset), the split and the tokenizer. It is built in a temporary folder and
  renamed when complete; builders of the same data wait for each other.

  What of a folder was left out, such as a run's own files, documents that are
  no text, and how a part is held out if there are too few documents, is said in
  a warning of a line each.

  Args:
    config: the texts, the split and the size of the vocabulary.
    tokenizer_path: a tokenizer to encode with, such as a trained model's own;
      None trains one of `config.vocab_size` on the train split.
    exclude: folders that are no text, beside `data_dir` and JAX's compilation
      cache: the run's own.
    both_splits: hold the end of every document out if otherwise one split would
      have no text. False leaves that split empty.
    progress: show on standard error how far it has come.

  Raises:
    InputError: a missing folder, no file or no text in it, something that
      cannot be read, an unavailable TFDS dataset, a train split without text,
      a file that is no tokenizer, or a `data_dir` that cannot be written to.
  """
  root = folders.expand("data_dir", config.data_dir)
  _require_utf8("data_dir", root)
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      "data_dir", root, f"a folder that can be made ({error.strerror})"
    ) from None
  tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
  source = _source(config, root, exclude)
  if source.left_out:
    logging.warning("Left out of the text: %s", source.left_out)
  identity = {
    "format": FORMAT_VERSION,
    "source": source.identity,
    "validation_percent": config.validation_percent,
    "both_splits": both_splits,
    "tokenizer": (
      ["train", config.vocab_size] if tokenizer is None else tokenizer.to_str()
    ),
  }
  digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  folder = root / f"{source.name}-{digest}"
  if not _exists(folder):
    with sources.lock(folder):
      if not folder.exists():  # another process may have built it meanwhile
        _build(folder, source, config, tokenizer, both_splits, progress)
  prepared = _load(folder)
  trained_for = None if tokenizer is not None else config.vocab_size
  _say(prepared, config.validation_percent, trained_for)
  return prepared


def _source(
  config: DataConfig,
  root: pathlib.Path,
  exclude: Iterable[str | os.PathLike[str]],
) -> sources.TextSource:
  if config.tfds_name:
    return sources.tfds_source(
      config.tfds_name,
      text_key=config.tfds_text_key,
      validation_percent=config.validation_percent,
      data_dir=root,
    )
  written = [root, *(folders.expand("exclude", path) for path in exclude)]
  cache = jax.config.jax_compilation_cache_dir
  if cache and "://" not in cache:
    written.append(folders.expand("jax_compilation_cache_dir", cache))
  return sources.folder_source(
    config.folder,
    glob=config.glob,
    validation_percent=config.validation_percent,
    exclude=written,
  )


def _require_utf8(field: str, path: pathlib.Path) -> None:
  """TFDS keeps paths in JSON and hands them to C++."""
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError:
    raise InputError(field, repr(os.fspath(path)), "a path in UTF-8") from None


def _exists(folder: pathlib.Path) -> bool:
  try:
    return folder.exists()
  except OSError as error:  # the folder around it is closed to this user
    raise damaged(folder, error) from None


def _build(
  folder: pathlib.Path,
  source: sources.TextSource,
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer | None,
  both_splits: bool,
  progress: bool,
) -> None:
  """Makes `folder`, whole or not at all. The caller holds its lock."""
  building = folder.with_name(f".{folder.name}.building")
  try:
    if building.exists():  # of a builder that was killed: it held the lock
      shutil.rmtree(building)
    building.mkdir()
    _build_in(building, source, config, tokenizer, both_splits, progress)
    os.rename(building, folder)
  except BaseException as error:
    shutil.rmtree(building, ignore_errors=True)
    if isinstance(error, InputError) or not isinstance(error, Exception):
      raise
    found = _os_error(error)
    if found is None:
      raise
    valid = f"a folder that can be written to, with room ({found.strerror})"
    raise InputError("data_dir", folder.parent, valid) from error


def _os_error(error: BaseException | None) -> OSError | None:
  """The error of the system behind what a library raised, if there is one."""
  while error is not None and not isinstance(error, OSError):
    error = error.__cause__ or error.__context__
  return error


def _build_in(
  building: pathlib.Path,
  source: sources.TextSource,
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer | None,
  both_splits: bool,
  progress: bool,
) -> None:
  """Makes what a folder of prepared data holds."""
  ends = both_splits and sources.leaves_a_split_empty(source)
  if ends:
    source = sources.hold_out_ends(
      source, validation_percent=config.validation_percent
    )
  size = source.total_bytes
  census = _Census()
  trains = tokenizer is None
  with counting("Reading", total=size, unit="B", enabled=progress) as advance:
    documents = census.watch(source.documents(), advance)
    if trains:
      train = (d.text for d in documents if d.split == "train" and d.text)
      tokenizer = train_tokenizer(train, vocab_size=config.vocab_size)
    else:
      for _ in documents:
        pass
  _require_text(census, config, both_splits=both_splits, trains=trains)
  save_tokenizer(tokenizer, building / "tokenizer.json")
  used = [split for split in sources.SPLITS if census.documents[split]]
  size = sum(census.text_bytes.values())
  with counting(
    "Tokenizing", total=size, unit="B", enabled=progress
  ) as advance:
    write_dataset(building, source, tokenizer, splits=used, advance=advance)
  shutil.rmtree(building / "downloads", ignore_errors=True)  # TFDS's, empty
  record = {
    "splits": {
      split: dataclasses.asdict(_split_info(building, split, census))
      for split in sources.SPLITS
    },
    "skipped": census.skipped,
    "empty": census.empty,
    "ends_held_out": ends,
    "files": _digests(building),
  }
  (building / "prepared.json").write_text(json.dumps(record, indent=2))


class _Census:
  """Counts documents as they pass."""

  def __init__(self):
    self.documents = dict.fromkeys(sources.SPLITS, 0)
    self.text_bytes = dict.fromkeys(sources.SPLITS, 0)
    self.skipped: list[str] = []
    self.empty = 0

  def watch(
    self,
    documents: Iterable[sources.Document],
    advance: Callable[[int], None],
  ) -> Iterator[sources.Document]:
    for document in documents:
      if document.text is None:
        self.skipped.append(document.name)
      elif not document.text:
        self.empty += 1
      else:
        size = len(document.text.encode())
        self.documents[document.split] += 1
        self.text_bytes[document.split] += size
        advance(size)
      yield document


def _require_text(
  census: _Census, config: DataConfig, *, both_splits: bool, trains: bool
) -> None:
  """Refuses an empty corpus, and one of which nothing can be held out."""
  field = "tfds_name" if config.tfds_name else "folder"
  found = config.tfds_name or config.folder or "(the standard library)"
  require(
    any(census.documents.values()),
    field,
    found,
    f"a corpus with text in it: {census.empty} documents are empty and "
    f"{len(census.skipped)} are not valid UTF-8",
  )
  require(
    all(census.documents.values()) or not both_splits,
    field,
    found,
    "text of which a part can be held out: it has one character",
  )
  require(
    census.documents["train"] or not trains,
    "validation_percent",
    config.validation_percent,
    "a share that leaves a document to train on; "
    f"all {census.documents['validation']} fall to validation",
  )


def _split_info(folder: pathlib.Path, split: str, census: _Census) -> SplitInfo:
  digest = write_index(folder, split, empty=not census.documents[split])
  piece_ends, document_starts = read_index(folder, split)
  return SplitInfo(
    documents=len(document_starts),
    text_bytes=census.text_bytes[split],
    tokens=int(piece_ends[-1]) if len(piece_ends) else 0,
    digest=digest,
  )


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """What ties the files together: sha256 of small ones, size of the pieces."""
  names = ["tokenizer.json", *(f"index-{name}.npz" for name in sources.SPLITS)]
  paths = [folder / name for name in names if (folder / name).exists()]
  found = {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in paths}
  pieces = sorted((folder / TextDataset.name).rglob("*.array_record*"))
  for path in pieces:
    size = path.stat().st_size
    found[path.relative_to(folder).as_posix()] = f"{size} bytes"
  return found


def _require_own_files(folder: pathlib.Path, record: dict[str, Any]) -> None:
  """Refuses files of a folder that are not those that it was made with."""
  if "files" not in record:
    logging.warning("%s: not known what its files were made of", folder)
  present = _digests(folder)
  for name, wanted in record.get("files", present).items():
    found = present.get(name, "missing")
    valid = f"{wanted}, as it was prepared; delete {folder} to prepare it anew"
    require(found == wanted, f"digest of {folder / name}", found, valid)


def _load(folder: pathlib.Path) -> PreparedData:
  path = folder / "tokenizer.json"
  try:
    record = json.loads((folder / "prepared.json").read_text())
    _require_own_files(folder, record)
    tokenizer = load_tokenizer(path)
    return PreparedData(
      folder=folder,
      tokenizer=tokenizer,
      tokenizer_path=path,
      splits={
        split: SplitInfo(**info) for split, info in record["splits"].items()
      },
      skipped=tuple(record["skipped"]),
      empty=record["empty"],
      ends_held_out=record["ends_held_out"],
    )
  except InputError:
    raise
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise damaged(folder, error) from None


def _say(
  prepared: PreparedData, validation_percent: int, vocab_size: int | None
) -> None:
  """What a user might not expect; at every start, also when nothing is made."""
  for split, info in prepared.splits.items():
    logging.info(
      "%s: %d documents, %d tokens", split, info.documents, info.tokens
    )
  if prepared.skipped:
    logging.warning(
      "%d files are not valid UTF-8 and were skipped, the first is %s",
      len(prepared.skipped),
      prepared.skipped[0],
    )
  if prepared.empty:
    logging.warning("%d files are empty and were skipped", prepared.empty)
  if prepared.ends_held_out:
    logging.warning(
      "too few documents to hold some of them out: of each the last "
      "%d %% are held out",
      validation_percent,
    )
  if vocab_size is not None and prepared.vocab_size < vocab_size:
    logging.warning(
      "the corpus gives a vocabulary of %d tokens, fewer than vocab_size = %d",
      prepared.vocab_size,
      vocab_size,
    )
