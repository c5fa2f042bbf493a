"""Tests of a run that starts from the weights of another."""

import dataclasses
import json

import numpy as np
import pytest

from engram_jax.config import YarnConfig
from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError
from engram_jax.run_config import DataConfig, ExperimentConfig, MeshConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.init_from import (
  SourceCheckpoint,
  find_source,
  init_state_from,
  record_source,
  tokenizer_of,
)
from engram_jax.training.runs import RunFolder
from engram_jax.training.state import flatten, unflatten


def experiment(tiny, **model) -> ExperimentConfig:
  """The tiny setup's config, with other fields of the model."""
  # No tokenizer is as small as the setup's vocabulary.
  model = {"vocab_size": 300} | model
  return ExperimentConfig(
    model=dataclasses.replace(tiny.setup.model, **model),
    data=DataConfig(vocab_size=300),
    train=tiny.setup.train,
  )


def metadata_of(tiny, config, **changes):
  return {
    "config": to_dict(config),
    "hash": tiny.setup.memory.hashing.to_dict(),
    "compression_digest": "c60a",
    "compression_size": 30,
    "tokenizer_digest": "70ce",
    "data_digest": "da7a",
    "versions": {"jax": "0.10.2"},
  } | changes


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
  """A run's folder with checkpoints of steps 3 and 7, and their states."""
  folder = RunFolder.of(tmp_path_factory.mktemp("trained"))
  config = experiment(tiny)
  folder.config.write_text(json.dumps(to_dict(config)))
  states = {}
  with Checkpoints(folder.checkpoints, keep_last=2, keep_best=0) as saved:
    for step in (3, 7):
      leaves = flatten(tiny.state(seed=step))
      for name in leaves:
        if not name.startswith("params/"):
          leaves[name] = leaves[name] + step
      states[step] = unflatten(tiny.abstract_state(), leaves)
      metadata = metadata_of(tiny, config)
      saved.save(step, states[step], run_metadata=metadata)
  return folder, states


def find(workdir, config, folder=None, step=None):
  init_from = folder and folder.path
  return find_source(workdir, config, init_from=init_from, init_step=step)


# --- the state ---


@pytest.mark.parametrize("step", [None, 3])
def test_weights_are_taken_and_nothing_else(step, tiny, trained, tmp_path):
  folder, states = trained
  source = find(tmp_path / "new", experiment(tiny), folder, step)
  assert source.step == (step or 7)
  assert not (tmp_path / "new").exists()
  state = init_state_from(source, tiny.setup)
  was, found = flatten(states[source.step]), flatten(state)
  fresh = flatten(tiny.abstract_state())
  assert list(found) == list(fresh)
  for name, leaf in found.items():
    assert (leaf.shape, leaf.dtype) == (fresh[name].shape, fresh[name].dtype)
    if name.startswith(("params/", "balance/", "tables/")):
      np.testing.assert_array_equal(leaf, was[name], err_msg=name)
      assert np.any(leaf), name
    else:
      assert not np.any(leaf), name


# --- what fits ---


FREE = {
  "attention": lambda m: dataclasses.replace(
    m.attention, yarn=YarnConfig(scale=8.0), block_size=16
  ),
  "scan_blocks": lambda m: True,
  "remat": lambda m: "block",
  "moe": lambda m: dataclasses.replace(
    m.moe,
    dispatch="bucketed",
    capacity_factor=2.0,
    balance_rate=0.5,
    balance_loss=0.5,
  ),
}


@pytest.mark.parametrize("field", FREE)
def test_what_may_differ(field, tiny, trained, tmp_path):
  config = experiment(tiny, **{field: FREE[field](tiny.setup.model)})
  assert find(tmp_path, config, trained[0]).step == 7


def test_the_rest_of_the_run_may_differ(tiny, trained, tmp_path):
  config = experiment(tiny)
  memory = dataclasses.replace(config.model.engram, dtype="bfloat16")
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, engram=memory, dtype="bfloat16"),
    data=dataclasses.replace(config.data, folder="/elsewhere"),
    train=dataclasses.replace(config.train, seq_len=96, steps=5, seed=1),
    mesh=MeshConfig(tensor=2),
  )
  source = find(tmp_path, config, trained[0])
  source.require_same(metadata_of(tiny, config, data_digest="other"))


OTHER = {
  "vocab_size": (lambda m: 400, "model.vocab_size: 400; valid: 300, as in"),
  "norm_eps": (lambda m: 1e-5, "model.norm_eps: 1e-05; valid: 1e-06, as in"),
  "attention": (
    lambda m: dataclasses.replace(m.attention, rope_theta=5e5),
    "model.attention.rope_theta: 500000.0; valid: 10000.0, as in",
  ),
  "moe": (
    lambda m: dataclasses.replace(m.moe, num_experts=8),
    "model.moe.num_experts: 8; valid: 4, as in",
  ),
  "engram": (
    lambda m: dataclasses.replace(m.engram, seed=1),
    "model.engram.seed: 1; valid: 0, as in",
  ),
}


@pytest.mark.parametrize("field", OTHER)
def test_what_may_not_differ(field, tiny, trained, tmp_path):
  config = experiment(tiny)
  value, message = OTHER[field]
  model = dataclasses.replace(config.model, **{field: value(config.model)})
  config = dataclasses.replace(config, model=model)
  with pytest.raises(InputError) as raised:
    find(tmp_path / "new", config, trained[0])
  assert str(raised.value).startswith(message)
  assert str(trained[0].path) in str(raised.value)


@pytest.mark.parametrize(
  "name", ["hash", "compression_digest", "tokenizer_digest"]
)
def test_tokenizer_and_hash_are_the_same(name, tiny, trained, tmp_path):
  config = experiment(tiny)
  source = find(tmp_path, config, trained[0])
  source.require_same(metadata_of(tiny, config))
  with pytest.raises(InputError, match=rf'^{name}: "other"; valid: '):
    source.require_same(metadata_of(tiny, config, **{name: "other"}))


def test_arrays_are_checked_by_name(tiny, make_tiny, trained):
  folder, _ = trained
  moe = dataclasses.replace(tiny.setup.model.moe, num_experts=8)
  wider = make_tiny(model={"moe": moe}).setup
  with pytest.raises(InputError, match=r"^backbone/.*moe_blocks/ffn/.* in "):
    init_state_from(SourceCheckpoint(folder, 7, {}), wider)


# --- where from ---


def test_what_is_not_there(tiny, trained, tmp_path):
  config = experiment(tiny)
  for folder, step, message in (
    (
      RunFolder.of(tmp_path / "no"),
      None,
      r"^init_from: .*no; valid: the fold",
    ),
    (trained[0], 5, r"^init_step: 5; valid: one of the steps 3, 7$"),
    (None, 5, r"^init_step: 5; valid: None without init_from$"),
  ):
    with pytest.raises(InputError, match=message):
      find(tmp_path / "new", config, folder, step)
  assert find(tmp_path / "new", config) is None


def test_started_again_before_its_first_checkpoint(tiny, trained, tmp_path):
  """It starts from there again, told so or not; and from nowhere else."""
  config, new = experiment(tiny), RunFolder.of(tmp_path)
  record_source(new, find(tmp_path, config, trained[0], 3))
  # Step 3, though the newest is 7.
  for folder, step in ((None, None), (trained[0], None), (trained[0], 3)):
    assert find(tmp_path, config, folder, step).step == 3
  for folder, step, message in (
    (trained[0], 7, r"^init_step: 7; valid: 3, from which this run started"),
    (new, None, r"^init_from: .*; valid: .*, from which this run started bef"),
  ):
    with pytest.raises(InputError, match=message):
      find(tmp_path, config, folder, step)


def test_the_tokenizer_comes_with_the_weights(tiny, trained, tmp_path):
  new = RunFolder.of(tmp_path)
  assert tokenizer_of(new, None) is None
  source = find(tmp_path, experiment(tiny), trained[0])
  assert tokenizer_of(new, source) == trained[0].tokenizer
  # Once it has checkpoints of its own, in its own folder.
  record_source(new, source)
  assert tokenizer_of(new, None) == new.tokenizer


def test_its_own_checkpoints_count(tiny, trained):
  folder, _ = trained
  other = RunFolder.of(folder.path / "no longer there")
  assert find(folder.path, experiment(tiny), other) is None
