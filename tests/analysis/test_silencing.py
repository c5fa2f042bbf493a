"""Tests of the scores of each target by the use of the memory."""

import jax
import numpy as np
import pytest

from engram_jax.analysis.silencing import (
  mean_by_group,
  rows_by_mode,
  scores_by_mode,
  token_scores,
)
from engram_jax.errors import InputError
from engram_jax.training.evaluation import MEMORY_MODES


@pytest.fixture(scope="module")
def scores(probed):
  parts = probed.model, probed.memory, probed.tables
  return scores_by_mode(*parts, [probed.batch, probed.batch])


def test_they_are_those_of_the_model(probed, scores):
  model, batch = probed.model, probed.batch
  keep = np.asarray(batch["loss_mask"])
  assert set(scores) == set(MEMORY_MODES)
  row_ids = probed.memory.row_ids(batch["inputs"], breaks=batch["breaks"])
  rows = {i: probed.tables[i][ids] for i, ids in row_ids.items()}
  for mode, given in (("on", rows), ("off", None)):
    found, one = scores[mode], jax.tree.map(lambda x: x[:17], scores[mode])
    assert found.loss.shape == found.correct.shape == (34,)
    # The same batch twice.
    np.testing.assert_array_equal(one.loss, found.loss[17:])
    output = jax.jit(
      lambda m, r: m(
        batch["inputs"], r, breaks=batch["breaks"], dispatch="dense"
      )
    )(model, given)
    logits = np.asarray(output.logits, np.float64)[keep]
    targets = np.asarray(batch["targets"])[keep]
    expected = np.log(np.exp(logits).sum(-1))
    expected -= logits[np.arange(17), targets]
    np.testing.assert_allclose(one.loss, expected, rtol=1e-4)
    hits = logits.argmax(-1) == targets
    np.testing.assert_array_equal(one.correct, hits)
    assert set(one.gates) == (set() if given is None else {0, 2})
    for layer, gates in one.gates.items():
      expected = np.asarray(output.gates[layer])[keep]
      np.testing.assert_allclose(gates, expected, rtol=1e-5)
  assert np.abs(scores["on"].loss - scores["off"].loss).max() > 0.01
  assert np.abs(scores["on"].loss - scores["shuffled"].loss).max() > 0.01


def test_rows_alike_do_not_care_whose_they_are(probed):
  alike = jax.tree.map(lambda x: x[:1].repeat(len(x), 0), probed.tables)
  on, shuffled = (
    rows_by_mode(probed.memory, alike, probed.batch, mode=mode)
    for mode in ("on", "shuffled")
  )
  for layer in (0, 2):
    np.testing.assert_array_equal(on[layer], shuffled[layer])


def test_a_model_without_memory_has_one_mode(make_probed):
  plain = make_probed(engram=None)
  found = scores_by_mode(plain.model, None, {}, [plain.batch])
  assert set(found) == {"on"} and found["on"].gates == {}
  whole = token_scores(plain.model, None, plain.batch)
  keep = np.asarray(plain.batch["loss_mask"])
  np.testing.assert_allclose(
    found["on"].loss, np.asarray(whole.loss)[keep], rtol=1e-6
  )


def test_refusals(probed):
  parts = probed.model, probed.memory, probed.tables
  with pytest.raises(InputError, match=r"^batches: none; valid: one or more"):
    scores_by_mode(*parts, [])
  with pytest.raises(InputError, match=r"^mode: quiet; valid: one of on, off"):
    rows_by_mode(*parts[1:], probed.batch, mode="quiet")


def test_means_by_group():
  groups = np.array(["b", "a", "b"])
  values = np.array([1.0, 5.0, 2.0])
  assert mean_by_group(values, groups) == {"a": 5.0, "b": 1.5}
  assert mean_by_group(values > 1, np.array([0, 0, 1])) == {"0": 0.5, "1": 1.0}
