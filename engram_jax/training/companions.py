"""Files beside a checkpoint, compared with the digests that it holds.

A run's folder holds a tokenizer and a compression, and its text lies elsewhere.
Others of the same sizes would be taken without an error and mean something
else: the loss rises, and nothing says why. So each is compared wherever it is
loaded, and one that is not the checkpoint's is refused.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from engram_jax.data.prepared import PreparedData
from engram_jax.data.tokenizers import load_tokenizer
from engram_jax.errors import require
from engram_jax.memory.compression import TokenCompression
from engram_jax.run_config import DataConfig


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
  """What a checkpoint knows its tokenizer by; 64 hexadecimal digits."""
  return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def own_tokenizer(
  path: pathlib.Path, stored: Mapping[str, Any]
) -> tokenizers.Tokenizer:
  """The tokenizer in a run's folder, which is the checkpoint's.

  Args:
    path: its file.
    stored: the checkpoint's run metadata.

  Raises:
    InputError: no tokenizer there, or that of another run.
  """
  tokenizer = load_tokenizer(path)
  _require_digest("tokenizer", path, tokenizer_digest(tokenizer), stored)
  return tokenizer


def own_compression(
  path: pathlib.Path, stored: Mapping[str, Any]
) -> TokenCompression:
  """The compression in a run's folder, which is the checkpoint's.

  Args:
    path: its file.
    stored: the checkpoint's run metadata.

  Raises:
    InputError: no compression there, or that of another run.
  """
  compression = TokenCompression.load(path)
  _require_digest("compression", path, compression.digest, stored)
  return compression


def require_own_files(
  tokenizer: pathlib.Path, compression: pathlib.Path, stored: Mapping[str, Any]
) -> None:
  """Refuses a folder with another run's tokenizer or compression in it.

  Args:
    tokenizer: the file of that name; if it is missing it is not asked for.
    compression: likewise; unused by a model without a memory.
    stored: a checkpoint's run metadata.

  Raises:
    InputError: the first of the two that is not the checkpoint's.
  """
  if tokenizer.exists():
    own_tokenizer(tokenizer, stored)
  if compression.exists() and stored["hash"] is not None:
    own_compression(compression, stored)


def text_digests(stored: Mapping[str, Any]) -> dict[str, str | None]:
  """Digests of the text that a checkpoint was trained and rated on, by split.

  Args:
    stored: its run metadata.

  Returns:
    None for a split that it does not know, as earlier checkpoints.
  """
  names = {"train": "data_digest", "validation": "held_out_digest"}
  return {split: stored.get(name) for split, name in names.items()}


def require_own_text(
  digests: Mapping[str, str | None], data: PreparedData, config: DataConfig
) -> list[str]:
  """Refuses text that is no longer what a checkpoint was trained and rated on.

  Args:
    digests: from `text_digests`.
    data: what the run's source of text gives now, under the run's tokenizer.
    config: names that source.

  Returns:
    Names of the splits of which the checkpoint knows no digest.

  Raises:
    InputError: a split whose tokens are others, with both digests.
  """
  where = config.tfds_name or config.folder or "the standard library"
  for split, wanted in digests.items():
    found = data.splits[split].digest
    valid = f"{wanted}, that of the run's own text: it has changed since"
    field = f"digest of the {split} text of {where}"
    require(wanted in (None, found), field, found, valid)
  return [split for split, wanted in digests.items() if wanted is None]


def _require_digest(
  what: str, path: pathlib.Path, found: str, stored: Mapping[str, Any]
) -> None:
  name = f"{what}_digest"
  wanted = stored[name]
  valid = f"{wanted}, the checkpoint's: the file is another run's"
  require(found == wanted, f"{name} of {path}", found, valid)
