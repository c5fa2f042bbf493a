"""Weights of a run on one device, for a run on eight."""

import jax
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig
from engram_jax.memory.memory import Memory
from engram_jax.run_config import TrainConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.init_from import SourceCheckpoint, init_state_from
from engram_jax.training.runs import RunFolder
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import flatten, unflatten

MODEL = ModelConfig(
  vocab_size=32,
  hidden_size=16,
  num_layers=1,
  attention=AttentionConfig(
    num_heads=2, nope_dim=4, rope_dim=2, value_dim=4, kv_rank=8
  ),
  dense_size=32,
  engram=EngramConfig(
    hidden_size=16,
    layers=(0,),
    # 53 + 61 rows: 8 devices pad them.
    rows_per_head=(50, 60),
    heads=1,
    head_dim=4,
    pad_id=0,
  ),
)


MEMORY = Memory.create(MODEL.engram, vocab_size=MODEL.vocab_size)


def make_setup(mesh):
  train = TrainConfig(steps=10, batch_size=8, seq_len=8)
  return TrainSetup.create(MODEL, train, MEMORY, mesh=mesh)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A checkpoint of one device; its state drawn by NumPy."""
  rng = np.random.default_rng(0)
  template = make_setup(None).abstract_state()
  leaves = {
    name: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    for name, leaf in flatten(template).items()
  }
  leaves["step"] = jax.numpy.asarray(7, "int32")
  folder = RunFolder.of(tmp_path_factory.mktemp("trained"))
  metadata = {"hash": MEMORY.hashing.to_dict()}
  with Checkpoints(folder.checkpoints, keep_last=1, keep_best=0) as saved:
    saved.save(7, unflatten(template, leaves), run_metadata=metadata)
  return SourceCheckpoint(folder, 7, metadata), leaves


def test_every_array_is_born_where_it_is_to_lie(trained, auto_mesh):
  source, was = trained
  setup = make_setup(auto_mesh)
  state = init_state_from(source, setup)
  expected = flatten(setup.abstract_state())
  for name, leaf in flatten(state).items():
    about = expected[name]
    assert (leaf.shape, leaf.dtype) == (about.shape, about.dtype)
    assert leaf.sharding.is_equivalent_to(about.sharding, leaf.ndim), name
    leaf = jax.device_get(leaf)
    if name.startswith("params/"):
      np.testing.assert_array_equal(leaf, was[name], err_msg=name)
    elif name.startswith("tables/"):
      rows = was[name].shape[0]
      assert len(leaf) % 8 == 0 and rows % 8
      np.testing.assert_array_equal(leaf[:rows], was[name])
      assert not leaf[rows:].any()
    else:
      assert not leaf.any(), name
