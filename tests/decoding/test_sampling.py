"""Sampling: what is drawn, how often, and what is never drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.sampling import (
  allowed_tokens,
  finite_logits,
  sample,
)
from engram_jax.errors import InputError, NonFiniteError

# Likeliest first, after a shuffle that the ids must survive.
CHANCES = np.array([0.5, 0.25, 0.12, 0.08, 0.04, 0.01])
IDS = np.array([3, 0, 5, 1, 4, 2])
DRAWS = 10_000


def logits(chances=CHANCES):
  values = np.empty(len(IDS), np.float32)
  values[IDS] = np.log(chances)
  return jnp.asarray(values)[None]


def frequencies(**options):
  """How often each id is drawn, likeliest id first."""
  options = {"temperature": 1.0} | options
  many = jnp.broadcast_to(logits(), (DRAWS, len(IDS)))
  drawn = sample(jax.random.key(0), many, **options)
  assert drawn.dtype == jnp.int32
  return np.bincount(drawn, minlength=len(IDS))[IDS] / DRAWS


def check(found, expected):
  expected = np.asarray(expected) / np.sum(expected)
  # Five standard deviations of a frequency.
  margin = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
  assert (np.abs(found - expected) <= margin).all(), (found, expected)


def test_frequencies_are_the_probabilities():
  check(frequencies(), CHANCES)
  check(frequencies(temperature=2.0), np.sqrt(CHANCES))
  check(frequencies(temperature=0.5), CHANCES**2)


def test_top_k_and_top_p_keep_the_likeliest():
  kept = np.arange(6)
  check(frequencies(top_k=2), CHANCES * (kept < 2))
  check(frequencies(top_k=6), CHANCES)
  # 0.5 + 0.25 reaches 0.7; 0.5 alone does not.
  check(frequencies(top_p=0.7), CHANCES * (kept < 2))
  check(frequencies(top_p=0.8), CHANCES * (kept < 3))
  check(frequencies(top_p=1e-9), kept == 0)
  check(frequencies(top_p=1.0), CHANCES)
  # Of the three likeliest 0.5 / 0.87 = 0.575 reaches 0.57: the nucleus is
  # taken of what top_k leaves.
  check(frequencies(top_k=3, top_p=0.57), kept == 0)


def test_temperature_changes_the_nucleus():
  # Squared and normalised, the first has 0.74.
  check(frequencies(temperature=0.5, top_p=0.7), np.arange(6) == 0)


def test_greedy_takes_the_likeliest_and_of_equals_the_smallest_id():
  two = jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 5.0]])
  drawn = sample(jax.random.key(0), two, temperature=0.0)
  assert drawn.tolist() == [1, 0] and drawn.dtype == jnp.int32
  cold = sample(jax.random.key(0), 1e4 * logits(), temperature=1e-6)
  assert cold.tolist() == [3]
  # Of equals top_k keeps as many as it says.
  equal = jnp.zeros((500, 4))
  drawn = sample(jax.random.key(0), equal, temperature=1.0, top_k=2)
  assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize(
  "options",
  [{}, {"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.99}],
  ids=["all", "greedy", "top_k", "top_p"],
)
def test_what_is_not_allowed_is_never_drawn(options):
  allowed = np.ones(6, bool)
  allowed[IDS[:2]] = False
  found = frequencies(allowed=allowed, **options)
  assert found[:2].tolist() == [0, 0] and found[2] > 0
  if not options:
    check(found, CHANCES * (np.arange(6) >= 2))


def test_allowed_tokens():
  allowed = allowed_tokens(6, vocab_size=4, pad_id=1)
  assert allowed.tolist() == [True, False, True, True, False, False]
  assert allowed_tokens(3, vocab_size=3, pad_id=None).all()
  for vocab_size in (0, 7):
    with pytest.raises(InputError, match=f"vocab_size: {vocab_size}"):
      allowed_tokens(6, vocab_size=vocab_size, pad_id=None)
  with pytest.raises(InputError, match="pad_id: 4; valid: 0 <= id < 4"):
    allowed_tokens(6, vocab_size=4, pad_id=4)
  with pytest.raises(InputError, match="vocab_size: 1; valid: an id besides"):
    allowed_tokens(6, vocab_size=1, pad_id=0)


def test_a_sequence_draws_from_its_own_stream():
  key = jax.random.key(3)
  same = jnp.zeros((64, 50))
  drawn = sample(key, same, temperature=1.0)
  assert len(set(drawn.tolist())) > 20
  other = same.at[1:].set(jax.random.normal(key, (63, 50)))
  assert sample(key, other, temperature=1.0)[0] == drawn[0]
  fewer = sample(key, same[:5], temperature=1.0)
  np.testing.assert_array_equal(fewer, drawn[:5])


@pytest.mark.parametrize(
  "name, values",
  [
    ("temperature", (-1.0, 1e-9, float("inf"), float("nan"))),
    ("top_k", (0, 7, -1)),
    ("top_p", (0.0, 1.1, -0.5, float("nan"))),
  ],
)
def test_refusals(name, values):
  for value in values:
    options = {"temperature": 1.0} | {name: value}
    with pytest.raises(InputError, match=f"^{name}: {value}; valid: "):
      sample(jax.random.key(0), logits(), **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
  "row", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3, [np.nan, -np.inf, -1]]
)
def test_logits_that_are_no_numbers_draw_nothing(row, temperature):
  values = jnp.array([[0.0, 1, 2], row])
  with pytest.raises(NonFiniteError, match=r"^logits\[1\]: "):
    sample(jax.random.key(0), values, temperature=temperature)
  np.testing.assert_array_equal(finite_logits(values), [True, False])


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 3e38])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 1e-300}])
def test_ends_of_the_range_draw_what_is_allowed(temperature, options):
  allowed = np.array([True, False, True, False])
  values = jnp.array([[-jnp.inf, jnp.nan, 3e38, jnp.inf], [-3e38, 0, 3e38, 1]])
  drawn = [
    sample(
      jax.random.key(seed),
      values,
      temperature=temperature,
      allowed=allowed,
      **options,
    )
    for seed in range(5)
  ]
  assert set(np.ravel(drawn)) <= {0, 2}
  # Of probability 0.
  assert {int(row[0]) for row in drawn} == {2}


@pytest.mark.parametrize(
  "options", [{"top_k": 2.5}, {"top_k": True}, {"temperature": 1e39}]
)
@pytest.mark.usefixtures("types_unchecked")
def test_numbers_that_would_be_rounded_are_refused(options):
  (name,) = options
  with pytest.raises(InputError, match=f"^{name}: "):
    sample(jax.random.key(0), logits(), **{"temperature": 1.0, **options})
