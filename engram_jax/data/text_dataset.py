"""Tokenised documents on disk: a TFDS dataset, and where things lie in it.

What is stored does not depend on the length of a training sequence: a document
is its token ids and `END_ID`, cut into pieces of at most `PIECE_TOKENS`. The
pieces of a split, in order, are one long stream; an index beside them says
where pieces end and documents start in it. ArrayRecord files, written and read
without TensorFlow.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from jaxtyping import Int

from engram_jax.data import sources
from engram_jax.data.tokenizers import END_ID, segments
from engram_jax.errors import InputError, first_line

#: A window reads every piece that it touches whole: short pieces waste less
#: there, long ones have fewer records. 4096 int32 read in under 0.1 ms.
PIECE_TOKENS = 4096
#: Documents are encoded together, by all cores, up to about this many
#: characters.
ENCODE_CHARACTERS = 1 << 21


class _Info(tfds.core.DatasetInfo):
  """Information about a dataset that exists nowhere else."""

  def initialize_from_bucket(self) -> None:
    """Does not look for it on a public server, as TFDS would."""


class TextDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Pieces of tokenised documents, in the order in which they are given.

  Features of a piece: `tokens` int32 [n], `starts_document` (whether it is the
  first piece of its document), `document` (its name).
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    *,
    source: sources.TextSource,
    tokenizer: tokenizers.Tokenizer,
    splits: Iterable[str],
    data_dir: str | os.PathLike[str],
    advance: Callable[[int], None] = lambda count: None,
  ):
    """Builds nothing yet; `download_and_prepare` does.

    Args:
      source: the documents.
      tokenizer: encodes them.
      splits: those that have documents (TFDS refuses to write empty ones).
      data_dir: folder of the dataset.
      advance: told how many bytes of text are encoded.
    """
    self._source, self._tokenizer = source, tokenizer
    self._advance = advance
    self._splits = tuple(splits)
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      # As raw bytes a piece is read a fifth faster than as a protobuf list of
      # int64, at the same size on disk.
      "tokens": tfds.features.Tensor(
        shape=(None,), dtype=np.int32, encoding="bytes"
      ),
      "starts_document": tfds.features.Scalar(dtype=np.bool_),
      "document": tfds.features.Text(),
    }
    return _Info(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # the pieces of a document must stay in order
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self._splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
    key = 0
    documents = (d for d in self._source.documents() if d.split == split)
    for name, tokens in _encode(self._tokenizer, documents, self._advance):
      for start in range(0, len(tokens), PIECE_TOKENS):
        piece = tokens[start : start + PIECE_TOKENS]
        yield (
          key,
          {"tokens": piece, "starts_document": start == 0, "document": name},
        )
        key += 1

  def _log_download_bytes(self) -> None:
    """Says nothing: there is no download."""

  def _log_download_done(self) -> None:
    """Says nothing: `prepare` does."""


def write_dataset(
  folder: pathlib.Path,
  source: sources.TextSource,
  tokenizer: tokenizers.Tokenizer,
  *,
  splits: Iterable[str],
  advance: Callable[[int], None] = lambda count: None,
) -> None:
  """Writes the pieces of these splits into `folder`; see `TextDataset`.

  Args:
    folder: the folder to write into.
    source: the documents, by split.
    tokenizer: the tokenizer that encodes them.
    splits: names of the splits to write.
    advance: called with the number of bytes encoded since the last call.
  """
  builder = TextDataset(
    source=source,
    tokenizer=tokenizer,
    splits=splits,
    data_dir=folder,
    advance=advance,
  )
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  # TFDS's bars say "examples" and "shards" of what a user knows as files; it
  # switches them for the whole process only, so the switch is put back.
  tqdm_utils = tfds.core.utils.tqdm_utils
  shown = tqdm_utils._active
  tqdm_utils.display_progress_bar(enable=False)
  try:
    builder.download_and_prepare(download_config=config)
  finally:
    tqdm_utils.display_progress_bar(enable=shown)


def read_pieces(folder: pathlib.Path, *, splits: Iterable[str]) -> Any:
  """The pieces of these splits, one split after the other.

  Args:
    folder: folder of the dataset.
    splits: names of the splits to read.

  Returns:
    A random-access sequence of mappings with the features of `TextDataset`;
    threads may read it together.

  Raises:
    InputError: files that are missing, damaged or cannot be read.
  """
  version = folder / TextDataset.name / str(TextDataset.VERSION)
  try:
    builder = tfds.builder_from_directory(version)
    return builder.as_data_source("+".join(splits))
  except Exception as error:  # TFDS and ArrayRecord raise nothing narrower
    raise damaged(folder, error) from error


def damaged(folder: pathlib.Path, error: Exception) -> InputError:
  """What is raised where prepared data cannot be read.

  Args:
    folder: folder of the dataset.
    error: what reading it raised.
  """
  reason = getattr(error, "strerror", None) or first_line(error)
  valid = f"prepared text that is whole and can be read ({reason[:160]}); "
  valid += "it is made again if its folder is removed"
  return InputError("data_dir", folder, valid)


def write_index(folder: pathlib.Path, split: str, *, empty: bool) -> str:
  """Reads a split's pieces once and writes where things lie in the stream.

  Made from what is stored, not from what was meant to be stored.

  Args:
    folder: folder of the dataset.
    split: one of `sources.SPLITS`.
    empty: whether it has no pieces, and so does not exist for TFDS.

  Returns:
    sha256 of the stream, its tokens and document starts as little-endian int32
    and int64.
  """
  lengths, starts, digest, position = [], [], hashlib.sha256(), 0
  for piece in () if empty else read_pieces(folder, splits=[split]):
    if piece["starts_document"]:
      starts.append(position)
    lengths.append(len(piece["tokens"]))
    position += lengths[-1]
    digest.update(piece["tokens"].astype("<i4").tobytes())
  ends = np.cumsum(np.array(lengths, np.int64))
  document_starts = np.array(starts, np.int64)
  digest.update(document_starts.astype("<i8").tobytes())
  path = folder / f"index-{split}.npz"
  np.savez(path, piece_ends=ends, document_starts=document_starts)
  return digest.hexdigest()


def read_index(
  folder: pathlib.Path, split: str
) -> tuple[Int[np.ndarray, "pieces"], Int[np.ndarray, "documents"]]:
  """Positions in a split's stream.

  Args:
    folder: folder of the dataset.
    split: one of `sources.SPLITS`.

  Returns:
    `piece_ends` int64 [pieces], one past each piece's last token;
    `document_starts` int64 [documents], the first token of each document.

  Raises:
    InputError: a file that is missing, damaged or cannot be read.
  """
  try:
    with np.load(folder / f"index-{split}.npz") as index:
      return index["piece_ends"], index["document_starts"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise damaged(folder, error) from None


def _encode(
  tokenizer: tokenizers.Tokenizer,
  documents: Iterable[sources.Document],
  advance: Callable[[int], None],
) -> Iterator[tuple[str, Int[np.ndarray, "n"]]]:
  """The name and the tokens, `END_ID` last, of every document with text."""

  def encode(parts: list[str]) -> Iterator[Int[np.ndarray, "n"]]:
    for encoding in tokenizer.encode_batch_fast(
      parts, add_special_tokens=False
    ):
      yield np.array(encoding.ids, np.int32)
    advance(sum(len(part.encode()) for part in parts))

  def tokens_of(group: list[sources.Document]) -> Iterator[tuple[str, Any]]:
    parts = [list(segments(document.text)) for document in group]
    # Also within a document: an encoding takes far more room than its ids.
    batches = _groups([part for texts in parts for part in texts], len)
    ids = (x for batch in batches for x in encode(batch))
    for document, texts in zip(group, parts):
      found = [next(ids) for _ in texts]
      yield (
        document.name,
        np.concatenate([*found, np.array([END_ID], np.int32)]),
      )

  with_text = (document for document in documents if document.text)
  for group in _groups(with_text, lambda document: len(document.text)):
    yield from tokens_of(group)


def _groups(
  items: Iterable[Any], characters: Callable[[Any], int]
) -> Iterator[list[Any]]:
  """Lists of items, each with about `ENCODE_CHARACTERS`."""
  group, found = [], 0
  for item in items:
    group.append(item)
    found += characters(item)
    if found >= ENCODE_CHARACTERS:
      yield group
      group, found = [], 0
  if group:
    yield group
