"""`prepare`: from a `DataConfig` to tokens on disk, once.

Everything that belongs together lies in one folder of `data_dir`:

  NAME-DIGEST/
    text_dataset/1.0.0/    the pieces (`text_dataset.py`)
    index-SPLIT.npz        where pieces end and documents start in the stream
    tokenizer.json         trained on the train split, or the one that was given
    prepared.json          counts and digests
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import tokenizers
from absl import logging

from engram_jax.data import sources
from engram_jax.data.text_dataset import (
  TextDataset,
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
from engram_jax.run_config import DataConfig

#: Of the layout above; part of the digest, so that old folders are not read.
FORMAT_VERSION = 1


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
  """

  folder: pathlib.Path
  tokenizer: tokenizers.Tokenizer
  tokenizer_path: pathlib.Path
  splits: dict[str, SplitInfo]
  skipped: tuple[str, ...]
  empty: int

  @property
  def vocab_size(self) -> int:
    """Number of token ids; a small corpus gives fewer than asked for."""
    return self.tokenizer.get_vocab_size()


def prepare(
  config: DataConfig, *, tokenizer_path: str | os.PathLike[str] | None = None
) -> PreparedData:
  """Makes tokens of the texts that `config` names, or finds them made.

  The result lies in a folder of `config.data_dir`, named by a digest of what
  determines it: the list of files with their sizes and times (or the TFDS
  dataset), the split and the tokenizer. It is built in a temporary folder and
  renamed when complete; builders of the same data wait for each other.

  Args:
    config: the texts, the split and the size of the vocabulary.
    tokenizer_path: a tokenizer to encode with, such as a trained model's own;
      None trains one of `config.vocab_size` on the train split.

  Raises:
    InputError: a missing folder, no file or no text in it, an unavailable TFDS
      dataset, a train split without text, or a file that is no tokenizer.
  """
  root = pathlib.Path(config.data_dir).expanduser().absolute()
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      "data_dir", root, f"a folder that can be made ({error.strerror})"
    ) from None
  tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
  source = _source(config, root)
  identity = {
    "format": FORMAT_VERSION,
    "source": source.identity,
    "validation_percent": config.validation_percent,
    "tokenizer": (
      ["train", config.vocab_size] if tokenizer is None else tokenizer.to_str()
    ),
  }
  digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  folder = root / f"{source.name}-{digest}"
  if not folder.exists():
    with sources.lock(folder):
      if not folder.exists():  # another process may have built it meanwhile
        _build(folder, source, config, tokenizer)
  return _load(folder)


def _source(config: DataConfig, root: pathlib.Path) -> sources.TextSource:
  if config.tfds_name:
    return sources.tfds_source(
      config.tfds_name,
      text_key=config.tfds_text_key,
      validation_percent=config.validation_percent,
      data_dir=root,
    )
  return sources.folder_source(
    config.folder,
    glob=config.glob,
    validation_percent=config.validation_percent,
    exclude=root,
  )


def _build(
  folder: pathlib.Path,
  source: sources.TextSource,
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer | None,
) -> None:
  """Makes `folder`, whole or not at all. The caller holds its lock."""
  building = folder.with_name(f"{folder.name}.building")
  if building.exists():  # of a builder that was killed: it held the lock
    shutil.rmtree(building)
  building.mkdir()
  try:
    census = _Census()
    if tokenizer is None:
      texts = census.watch(source.documents())
      train = (d.text for d in texts if d.split == "train" and d.text)
      tokenizer = train_tokenizer(train, vocab_size=config.vocab_size)
      _require_text(census, config)
      require(
        census.documents["train"],
        "validation_percent",
        config.validation_percent,
        "a share that leaves a document to train on; "
        f"all {census.documents['validation']} fall to validation",
      )
    else:
      for _ in census.watch(source.documents()):
        pass
      _require_text(census, config)
    save_tokenizer(tokenizer, building / "tokenizer.json")
    used = [split for split in sources.SPLITS if census.documents[split]]
    write_dataset(building, source, tokenizer, splits=used)
    shutil.rmtree(building / "downloads", ignore_errors=True)  # TFDS's, empty
    record = {
      "splits": {
        split: dataclasses.asdict(_split_info(building, split, census))
        for split in sources.SPLITS
      },
      "skipped": census.skipped,
      "empty": census.empty,
      "files": _digests(building),
    }
    (building / "prepared.json").write_text(json.dumps(record, indent=2))
    os.rename(building, folder)
  except BaseException:
    shutil.rmtree(building, ignore_errors=True)
    raise
  _say(_load(folder), config)


class _Census:
  """Counts documents as they pass."""

  def __init__(self):
    self.documents = dict.fromkeys(sources.SPLITS, 0)
    self.text_bytes = dict.fromkeys(sources.SPLITS, 0)
    self.skipped: list[str] = []
    self.empty = 0

  def watch(
    self, documents: Iterable[sources.Document]
  ) -> Iterator[sources.Document]:
    for document in documents:
      if document.text is None:
        self.skipped.append(document.name)
      elif not document.text:
        self.empty += 1
      else:
        self.documents[document.split] += 1
        self.text_bytes[document.split] += len(document.text.encode())
      yield document


def _require_text(census: _Census, config: DataConfig) -> None:
  """Refuses an empty corpus."""
  field = "tfds_name" if config.tfds_name else "folder"
  found = config.tfds_name or config.folder or "(the standard library)"
  require(
    any(census.documents.values()),
    field,
    found,
    f"a corpus with text in it: {census.empty} documents are empty and "
    f"{len(census.skipped)} are not valid UTF-8",
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


def _load(folder: pathlib.Path) -> PreparedData:
  record = json.loads((folder / "prepared.json").read_text())
  if "files" not in record:
    logging.warning("%s: not known what its files were made of", folder)
  present = _digests(folder)
  for name, wanted in record.get("files", present).items():
    found = present.get(name, "missing")
    valid = f"{wanted}, as it was prepared; delete {folder} to prepare it anew"
    require(found == wanted, f"digest of {folder / name}", found, valid)
  path = folder / "tokenizer.json"
  return PreparedData(
    folder=folder,
    tokenizer=load_tokenizer(path),
    tokenizer_path=path,
    splits={
      split: SplitInfo(**info) for split, info in record["splits"].items()
    },
    skipped=tuple(record["skipped"]),
    empty=record["empty"],
  )


def _say(prepared: PreparedData, config: DataConfig) -> None:
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
  if prepared.vocab_size < config.vocab_size:
    logging.warning(
      "the corpus gives a vocabulary of %d tokens, fewer than vocab_size = %d",
      prepared.vocab_size,
      config.vocab_size,
    )
