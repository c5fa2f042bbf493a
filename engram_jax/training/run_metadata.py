"""Run metadata: what a checkpoint says of its run, and what may differ.

Beside its arrays every checkpoint holds the config, the hash's multipliers and
primes, digests of compression, tokenizer and text, and versions. Whether two
runs are the same, or similar enough for weights to pass from one to the other,
is decided here alone: `difference` returns what differs, and its callers say it
in their words.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

from engram_jax.config_dicts import completed, for_digest, from_dict, to_dict
from engram_jax.errors import InputError
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.memory import Memory
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.checksums import weights_digest
from engram_jax.training.companions import tokenizer_digest
from engram_jax.training.json_values import first_difference, plain

#: Fields in which a run may differ from the one it continues: none of them
#: alters a step. All the others do, the length of the run
#: included, because the learning rate drops at shares of it.
FREE_ON_RESUME = frozenset(
  {
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.log_every",
    "data.data_dir",
    # The same function, and sums in another order.
    "model.scan_blocks",
    "model.remat",
    "model.attention.block_size",
    "train.loss_chunk",
    # Another mesh sums in another order, and where experts are full it drops
    # other tokens: the same run, but not bit for bit.
    "mesh.replica",
    "mesh.data",
    "mesh.expert",
    "mesh.tensor",
    "mesh.lookup",
    "mesh.lookup_capacity",
  }
)

#: Fields in which a new run may differ from the one whose weights it starts
#: from, with all that is below them. Of
#: the data, what matters is the tokenizer, which is compared by its digest.
FREE_ON_INIT = frozenset(
  {
    "config.model.attention.yarn",
    "config.model.attention.block_size",
    "config.model.scan_blocks",
    "config.model.remat",
    "config.model.dtype",
    "config.model.engram.dtype",
    "config.model.moe.dispatch",
    "config.model.moe.capacity_factor",
    "config.model.moe.balance_rate",
    "config.model.moe.balance_loss",
    "config.data",
    "config.train",
    "config.mesh",
    "data_digest",
    "held_out_digest",
    "versions",
  }
)


PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Difference(NamedTuple):
  """The first field in which two runs differ, with both values as texts.

  Attributes:
    field: its path; one of the config without "config." before it.
    found: the value of the run that was there first.
    expected: the other run's.
  """

  field: str
  found: str
  expected: str


def make_run_metadata(
  config: ExperimentConfig,
  memory: Memory | None,
  *,
  tokenizer: tokenizers.Tokenizer,
  data_digest: str,
  held_out_digest: str | None = None,
) -> dict[str, Any]:
  """What every checkpoint holds beside its arrays, ready for JSON.

  Args:
    config: the whole run's.
    memory: the model's; None without one.
    tokenizer: the run's.
    data_digest: digest of the text that it trains on.
    held_out_digest: digest of the text that it is rated on.
  """
  return {
    "config": to_dict(config),
    "hash": memory and memory.hashing.to_dict(),
    "compression_digest": memory and memory.compression.digest,
    "compression_size": memory and memory.compression.size,
    "tokenizer_digest": tokenizer_digest(tokenizer),
    "data_digest": data_digest,
    "held_out_digest": held_out_digest,
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
  }


def read_run_metadata(saved: Checkpoints, step: int | None = None) -> dict:
  """A checkpoint's, with the defaults of fields that it predates.

  Args:
    saved: the checkpoints.
    step: None for the latest.

  Raises:
    InputError: no such checkpoint, a damaged one, or one whose config has
      fields that are unknown here.
  """
  stored = saved.read_run_metadata(step)
  source = f"the checkpoint in {saved.directory}"
  config = completed(ExperimentConfig, stored["config"], source=source)
  return stored | {"config": config}


def memory_of(
  stored: Mapping[str, Any], compression: TokenCompression | None
) -> Memory | None:
  """The memory that a checkpoint was trained with; nothing is drawn anew.

  Args:
    stored: the run metadata of the checkpoint.
    compression: the run's, whose digest has been compared.
  """
  if stored["hash"] is None:
    return None
  config = from_dict(ExperimentConfig, stored["config"])
  hashing = NgramHash.from_dict(stored["hash"])
  return Memory(config.model.engram, compression, hashing)


def difference(
  found: Mapping[str, Any], expected: Mapping[str, Any], *, init: bool = False
) -> Difference | None:
  """The first field in which two runs differ and may not; None for none.

  Args:
    found: run metadata of the run that was there first, of a checkpoint say;
      or parts of it.
    expected: the same parts of the other run's.
    init: whether the other run starts from the weights of the first
      (`FREE_ON_INIT`), instead of going on with it (`FREE_ON_RESUME`).
  """

  def free(path: str) -> bool:
    if init:
      return path in FREE_ON_INIT
    if path == "held_out_digest":
      return path not in found  # as in earlier checkpoints
    return path == "versions" or path.removeprefix("config.") in FREE_ON_RESUME

  if init:
    found = {name: found.get(name) for name in expected}
  first = first_difference(plain(found), plain(expected), free=free)
  if first is None:
    return None
  path, was, wanted = first
  return Difference(path.removeprefix("config."), was, wanted)


def require_same_run(
  found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
  """Refuses a checkpoint of another run.

  Args:
    found: the checkpoint's run metadata.
    expected: this run's.

  Raises:
    InputError: the first field that differs, with both values.
  """
  other = difference(found, expected)
  if other is not None:
    value = f"{other.found} in the checkpoint"
    raise InputError(other.field, value, other.expected)


def weights_identity(
  step: int, stored: Mapping[str, Any], manifest: Mapping[str, Any]
) -> WeightsIdentity:
  """The identity of a checkpoint's weights.

  Args:
    step: step of the checkpoint.
    stored: its run metadata.
    manifest: what it says of its arrays.
  """

  def kept(value: Any, path: str) -> Any:
    """Without the fields in which the checkpoints of one run may differ."""
    if not isinstance(value, dict):
      return value
    paths = {name: f"{path}.{name}" if path else name for name in value}
    return {
      name: kept(value[name], paths[name])
      for name in sorted(value)
      if paths[name] not in FREE_ON_RESUME
    }

  names = "hash", "compression_digest", "tokenizer_digest", "data_digest"
  config = for_digest(ExperimentConfig, stored["config"])
  of_run = [kept(config, ""), *map(stored.get, names)]
  run = hashlib.sha256(json.dumps(of_run).encode()).hexdigest()
  return WeightsIdentity(run, step, weights_digest(manifest))
