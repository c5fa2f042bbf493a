"""A diverged run is an error of its own, recorded and not repeated."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from engram_jax.errors import InputError
from engram_jax.run_config import TrainConfig
from engram_jax.training.divergence import (
  DivergedError,
  diverged,
  require_none,
  weights_are_finite,
)
from engram_jax.training.runs import RunFolder
from engram_jax.training.state import flatten, unflatten


def test_it_names_the_step_the_last_good_checkpoint_and_what_to_try(tmp_path):
  folder = RunFolder.of(tmp_path)
  require_none(folder)
  for step in (4, 8):
    (folder.checkpoints / str(step)).mkdir(parents=True)
  train = TrainConfig(
    steps=20, batch_size=1, seq_len=8, learning_rate=1e20, warmup_steps=0
  )
  words = r"step 9: loss is nan; .* is step 8; .*learning_rate = 1e\+20.*"
  with pytest.raises(DivergedError, match=words + "init_step=8$"):
    diverged(folder, train, step=9, what="loss is nan")
  json.loads(folder.diverged.read_text(), parse_constant=pytest.fail)
  # The same command would do the same again.
  with pytest.raises(DivergedError, match=words + r"remove .*diverged\.json"):
    require_none(folder)
  folder.diverged.write_text("{")
  with pytest.raises(InputError, match=r"^diverged\.json: "):
    require_none(folder)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_weight_that_is_not_finite_is_seen(tiny, value):
  state = tiny.state()
  assert weights_are_finite(state)
  leaves = flatten(state)
  for field in ("params", "tables"):
    name = next(x for x in leaves if x.startswith(f"{field}/"))
    broken = leaves | {
      name: leaves[name].at[(0,) * leaves[name].ndim].set(value)
    }
    assert not weights_are_finite(unflatten(state, broken))
  # Moments that overflow are not weights.
  assert weights_are_finite(dataclasses.replace(state, opt_state=jnp.inf))
