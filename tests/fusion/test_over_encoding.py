"""OverEncoding: the average of the embedding and the n-grams' vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.fusion import linen
from engram_jax.fusion.engram import Engram
from engram_jax.fusion.over_encoding import OverEncoding
from engram_jax.types import Break

FIELDS = dict(
  hidden_size=12,
  layers=(0,),
  rows_per_head=(31, 37),
  heads=2,
  head_dim=5,
  streams=3,
  fusion="input_average",
  short_conv=False,
)
CONFIG = EngramConfig(**FIELDS)


@pytest.fixture(scope="module")
def module():
  return OverEncoding(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def given():
  a, b = jax.random.split(jax.random.key(0))
  return jax.random.normal(a, (2, 6, 3, 12)), jax.random.normal(b, (2, 6, 4, 5))


def test_it_is_the_average(module, given):
  hidden, rows = given
  fused = module.fuse(hidden, rows)
  bigrams = rows[:, :, :2].reshape(2, 6, 10) @ module.projection[:10]
  trigrams = rows[:, :, 2:].reshape(2, 6, 10) @ module.projection[10:]
  expected = (hidden + (bigrams + trigrams)[:, :, None]) / 3
  np.testing.assert_allclose(
    hidden + fused.update, expected, rtol=1e-5, atol=1e-6
  )
  assert fused.state is None
  np.testing.assert_array_equal(fused.gates, np.ones((2, 6, 3)))
  update, state = module(hidden[:, :, 0], rows)
  np.testing.assert_array_equal(update, fused.update[:, :, 0])
  assert state is None


def test_what_is_no_text_keeps_its_embedding(module, given):
  breaks = jnp.zeros((2, 6), jnp.int8).at[:, 2].set(Break.NON_TEXT)
  fused = module.fuse(*given, breaks=breaks)
  assert not fused.update[:, 2].any() and not fused.gates[:, 2].any()
  assert fused.update[:, 3].all()


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"layers": (1,)}, r"^layers: \(1,\); valid: \(0,\) with fusion"),
    ({"short_conv": True}, r"^short_conv: True; valid: False with fusion"),
    ({"projection_bias": True}, r"^projection_bias: True; valid: False"),
    ({"fusion": "sum"}, r"^fusion: sum; valid: one of gated, input_average"),
  ],
)
def test_configs_that_it_has_no_place_for(changes, match):
  with pytest.raises(InputError, match=match):
    EngramConfig(**FIELDS | changes)


def test_refusals_by_name(module, given, types_unchecked):
  hidden, rows = given
  with pytest.raises(InputError, match=r"^rows: .*K \* d = 20"):
    module(hidden, rows[:, :, :3])
  with pytest.raises(InputError, match=r"^hidden: .*\[B, L, G, 12\]"):
    module(hidden[..., :11], rows)
  with pytest.raises(InputError, match=r"^fusion: input_average; valid: gated"):
    Engram(CONFIG, rngs=nnx.Rngs(0))
  with pytest.raises(InputError, match=r"^fusion: input_average; valid: gated"):
    linen.Engram(CONFIG).init(jax.random.key(0), hidden, rows)
  gated = EngramConfig(**FIELDS | {"fusion": "gated"})
  with pytest.raises(InputError, match=r"^fusion: gated; valid: input_average"):
    OverEncoding(gated, rngs=nnx.Rngs(0))
