"""Decoding with every option of the memory: a token at a time is the whole."""

import numpy as np
import pytest

from engram_jax.decoding.decoders import Decoder
from engram_jax.errors import InputError
from engram_jax.stores.open_store import open_store

TOKENS = np.random.default_rng(0).integers(1, 24, (2, 7)).astype(np.int32)
OPTIONS = {
  "unigrams": dict(smallest_order=1, rows_per_head=(60,), conv_dilation=None),
  "unigrams too": dict(smallest_order=1, rows_per_head=(50, 60, 70)),
  "one row": dict(addressing="one_row"),
  "no gate": dict(gate=False),
  "input average": dict(fusion="input_average", layers=(0,), short_conv=False),
}


@pytest.mark.parametrize("home", ["device", "host"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_equal_the_whole_sequence(make_tiny_with, name, home):
  tiny = make_tiny_with("conv", **OPTIONS[name])
  whole = tiny.logits(TOKENS)
  store = open_store(home, tiny.tables, tiny.hashing)
  with Decoder(tiny.model, tiny.memory, store) as decoder:
    state = decoder.init_state(2, 8)
    assert state.history.shape == (2, tiny.hashing.max_order - 1)
    logits, state = decoder.start(state, TOKENS[:, :4], np.array([4, 4]))()
    for i in range(4, 7):
      np.testing.assert_allclose(logits, whole[:, i - 1], rtol=1e-4, atol=1e-4)
      logits, state = decoder.start(state, TOKENS[:, i])()
    np.testing.assert_allclose(logits, whole[:, 6], rtol=1e-4, atol=1e-4)


def test_shuffled_rows_cannot_be_decoded(make_tiny_with):
  tiny = make_tiny_with("conv", addressing="shuffled")
  with pytest.raises(InputError, match=r"^addressing: shuffled; valid: "):
    Decoder(*tiny.parts)
