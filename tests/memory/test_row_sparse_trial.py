"""What `row_sparse` refuses: it tries a transformation before it is used."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import row_sparse, sum_duplicates

TABLE = jax.random.normal(jax.random.key(9), (40, 3))
BATCH = sum_duplicates(
  jnp.array([1, 2]), jax.random.normal(jax.random.key(0), (2, 3)), num_rows=40
)

COUPLING = {
  "a global norm": lambda: optax.clip_by_global_norm(1.0),
  "a norm inside a chain": lambda: optax.chain(
    optax.scale_by_adam(), optax.clip_by_global_norm(1.0)
  ),
  "Muon": lambda: optax.contrib.scale_by_muon(),
  "noise": lambda: optax.add_noise(0.1, 0.5, 0),
  "a trust ratio": lambda: optax.scale_by_trust_ratio(),
  "the mean of other rows' params": lambda: optax.stateless(
    lambda g, p: g + 0.1 * jnp.mean(p, axis=0)
  ),
  "a count of rows": lambda: optax.stateless(lambda g, p: g / g.shape[0]),
}
FACTORED = {
  "factored moments": lambda: optax.scale_by_factored_rms(
    min_dim_size_to_factor=2
  ),
  "one moment of all columns": lambda: optax.GradientTransformation(
    lambda p: jnp.zeros(p.shape[1]), lambda g, s, p: (g, s)
  ),
}


@pytest.mark.parametrize("name", COUPLING)
def test_what_couples_rows_is_refused(name):
  match = "^row_sparse transformation: (couples rows|state of shape)"
  with pytest.raises(InputError, match=match):
    row_sparse(COUPLING[name]()).init(TABLE)


def test_a_transformation_is_tried_before_it_is_used():
  tried = []

  def update(gradients, state, params=None):
    tried.append(gradients.shape)
    return gradients, state

  quiet = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
  optimizer = row_sparse(quiet)
  jax.eval_shape(optimizer.init, TABLE)  # shapes alone want no trial
  assert tried == []
  optimizer.init(TABLE)
  first = len(tried)
  assert first > 0
  optimizer.init(TABLE)
  optimizer.update(TABLE, optax.EmptyState(), BATCH, 0.1)
  assert len(tried) == first + 1  # the trial is not repeated
  coupling = row_sparse(optax.clip_by_global_norm(1.0))
  with pytest.raises(InputError, match=r"^row_sparse transformation: couples"):
    coupling.update(TABLE, optax.EmptyState(), BATCH, 0.1)


@pytest.mark.parametrize("name", FACTORED)
def test_a_state_that_is_not_of_rows_is_refused(name):
  match = r"^row_sparse transformation: state of shape \(.*\) for a table"
  with pytest.raises(InputError, match=match):
    row_sparse(FACTORED[name]())


def test_a_learning_rate_is_given_once():
  state, batch = optax.EmptyState(), BATCH
  with pytest.raises(
    InputError, match=r"^learning_rate: None; valid: a number"
  ):
    row_sparse(optax.identity()).update(TABLE, state, batch, None)
  descending = row_sparse(optax.sgd(0.1))
  with pytest.raises(InputError, match=r"^learning_rate: 0\.1; valid: None"):
    descending.update(TABLE, descending.init(TABLE), batch, 0.1)


def test_row_sparse_may_be_made_under_a_trace():
  def step(current, batch):
    optimizer = row_sparse(optax.scale_by_adam())
    return optimizer.update(current, optimizer.init(current), batch, 0.1)[0]

  found = jax.jit(step)(TABLE, BATCH)
  chex.assert_trees_all_close(found, step(TABLE, BATCH))
