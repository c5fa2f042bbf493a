"""Tests of which runs a checkpoint belongs to."""

import re
import typing

import pytest

from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError
from engram_jax.run_config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  TrainConfig,
)
from engram_jax.training.run_metadata import (
  FREE_ON_RESUME,
  require_same_run,
)


def config_of(**train):
  options = {"steps": 10, "batch_size": 4, "seq_len": 8} | train
  return {
    "model": {"hidden_size": 64, "engram": {"layers": [1, 14]}},
    "data": to_dict(DataConfig()),
    "train": to_dict(TrainConfig(**options)),
    "mesh": to_dict(MeshConfig()),
  }


def metadata_of(**changes):
  metadata = {
    "config": config_of(),
    "hash": {"multipliers": [[3, 5], [7, 9]]},
    "compression": {"digest": "c60a", "size": 12},
    "versions": {"jax": "0.10.2"},
  }
  return metadata | changes


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"config": config_of() | {"model": {"hidden_size": 128}}},
      "model.hidden_size: 64 in the checkpoint; valid: 128",
    ),
    (
      {"config": config_of(steps=11)},
      "train.steps: 10 in the checkpoint; valid: 11",
    ),
    (
      {"config": config_of(decay_points=(0.5, 0.9))},
      "train.decay_points[0]: 0.8 in the checkpoint; valid: 0.5",
    ),
    (
      {"hash": {"multipliers": [[3, 5], [7, 11]]}},
      "hash.multipliers[1][1]: 9 in the checkpoint; valid: 11",
    ),
    (
      {"hash": {"multipliers": [[3, 5]]}},
      "hash.multipliers: [[3, 5], [7, 9]] in the checkpoint; valid: [[3, 5]]",
    ),
    (
      {"hash": None},
      'hash: {"multipliers": [[3, 5], [7, 9]]} in the checkpoint; valid: null',
    ),
    (
      {"compression": {"digest": "c60b", "size": 12}},
      'compression.digest: "c60a" in the checkpoint; valid: "c60b"',
    ),
    (
      {"tokenizer_digest": "ab"},
      'tokenizer_digest: missing in the checkpoint; valid: "ab"',
    ),
    # True is 1 for Python, and 1 is 1.0, but not the same config.
    (
      {"compression": {"digest": "c60a", "size": True}},
      "compression.size: 12 in the checkpoint; valid: true",
    ),
  ],
)
def test_another_run_is_refused_by_its_first_field(changes, message):
  with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
    require_same_run(metadata_of(), metadata_of(**changes))


def test_a_field_that_this_run_does_not_know_is_refused():
  found = metadata_of(extra=1)
  with pytest.raises(InputError, match=r"^extra: 1 in .*; valid: missing$"):
    require_same_run(found, metadata_of())


def test_fields_that_alter_no_step_may_differ():
  free = config_of(
    eval_every=1,
    eval_batches=2,
    checkpoint_every=3,
    keep_last=4,
    keep_best=5,
    log_every=6,
  )
  free["data"]["data_dir"] = "/elsewhere"
  require_same_run(
    metadata_of(), metadata_of(config=free, versions={"jax": "0.12"})
  )
  # Each of them is the name of a field.
  for path in FREE_ON_RESUME:
    cls = ExperimentConfig
    for name in path.split("."):
      hints = typing.get_type_hints(cls)
      assert name in hints, path
      cls = hints[name]
  long = metadata_of(hash={"primes": list(range(1000))})
  with pytest.raises(InputError, match=r"^hash.primes: \[0, 1,") as caught:
    require_same_run(long, metadata_of(hash={"primes": [1]}))
  assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
