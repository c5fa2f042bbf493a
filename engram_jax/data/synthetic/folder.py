"""A folder of synthetic documents to train on.

`DataConfig(folder=..., glob="*.txt")` reads it.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

from engram_jax.data import folders
from engram_jax.data.sources import SPLITS, Document, split_of
from engram_jax.errors import InputError, require
from engram_jax.files import usable

#: What the folder was made of, seeds included.
DESCRIPTION = "synthetic.json"


def write_folder(
  path: str | os.PathLike[str],
  documents: Iterable[Document],
  *,
  configs: Iterable[Any],
  validation_percent: int = 5,
) -> pathlib.Path:
  """Writes one file for each document; the folder appears whole or not at all.

  A file's name is chosen so that its hash puts it in its document's split:
  with the same `validation_percent` in `DataConfig` no statement that is to be
  trained on is held out. A folder that is there already, made of equal configs,
  is left as it is, and no document is read.

  Args:
    path: the new folder; the folder around it is made if need be.
    documents: with distinct names. They may come from several tasks, and from
      `sources.folder_source`.
    configs: the dataclasses that the documents were made of, which are written
      to `DESCRIPTION`.
    validation_percent: as in the `DataConfig`.

  Returns:
    The folder's absolute path.

  Raises:
    InputError: a folder of other content, two documents of one name, one
      without text or of an unknown split, or a place that cannot be written to.
  """
  path = folders.expand("path", path)
  described = json.dumps(
    {
      "validation_percent": validation_percent,
      "configs": [
        {"task": type(config).__name__, **dataclasses.asdict(config)}
        for config in configs
      ],
    },
    indent=2,
  )
  if path.exists():
    _require_same(path, described)
    return path
  with usable(path, "a folder that can be made"):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(
      tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    )
  try:
    with usable(path, "a folder that can be written to"):
      for document in documents:
        _write(partial, document, validation_percent)
      (partial / DESCRIPTION).write_text(f"{described}\n")
      partial.chmod(0o755)  # mkdtemp's 0o700 would shut out other users
    try:
      partial.rename(path)
    except OSError:
      # Another process was faster.
      _require_same(path, described)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return path


def _write(
  folder: pathlib.Path, document: Document, validation_percent: int
) -> None:
  valid = f"one of {', '.join(SPLITS)}"
  require(document.split in SPLITS, "split", document.split, valid)
  require(document.text, "documents", document.name, "documents with text")
  for number in range(10**6):
    name = f"{document.name}-{number}.txt"
    split = split_of(os.fsencode(name), validation_percent=validation_percent)
    if split == document.split:
      break
  file = folder / name
  file.parent.mkdir(parents=True, exist_ok=True)
  try:
    with open(file, "x", encoding="utf-8") as text:
      text.write(document.text)
  except FileExistsError:
    valid = "documents with distinct names"
    raise InputError("documents", document.name, valid) from None


def _require_same(path: pathlib.Path, described: str) -> None:
  valid = f"a new folder, or one with {DESCRIPTION} of the same configs"
  file = path / DESCRIPTION
  require(file.is_file(), "path", path, valid)
  require(file.read_bytes() == f"{described}\n".encode(), "path", path, valid)
