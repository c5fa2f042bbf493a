"""Bad input is refused in one line; under a trace the refusal is checkable."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from engram_jax.errors import (
  InputError,
  check_in_range,
  require,
  require_in_range,
)


def ranged(ids):
  check_in_range("ids", ids, low=0, high=5)
  return ids


def required(ids):
  require_in_range("ids", ids, low=0, high=5)
  return ids


CHECKED = jax.jit(checkify.checkify(ranged, errors=checkify.user_checks))


def test_message_and_attributes():
  error = InputError("heads", 0, "a number above 0")
  assert str(error) == "heads: 0; valid: a number above 0"
  assert (error.field, error.value, error.valid) == (
    "heads",
    0,
    "a number above 0",
  )
  assert isinstance(error, ValueError)


def test_long_values_stay_on_one_line():
  error = InputError("ids", np.zeros((50, 50)), "a scalar")
  assert "\n" not in str(error)
  assert len(str(error)) < 150
  assert str(error).endswith("...; valid: a scalar")


def test_survives_a_process_boundary():
  error = pickle.loads(pickle.dumps(InputError("heads", 0, "above 0")))
  assert str(error) == "heads: 0; valid: above 0"
  assert (error.field, error.value, error.valid) == ("heads", 0, "above 0")


def test_any_field_name_under_a_trace():
  check = lambda x: check_in_range("rows{1}", x, low=0, high=5)
  checked = checkify.checkify(check, errors=checkify.user_checks)
  error, _ = jax.jit(checked)(jnp.array([9]))
  with pytest.raises(checkify.JaxRuntimeError, match=r"rows\{1\}: 9; valid"):
    error.throw()


def test_require():
  require(True, "field", 1, "anything")
  with pytest.raises(InputError, match=r"^field: 1; valid: nothing$"):
    require(False, "field", 1, "nothing")


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, list])
def test_concrete_ids(convert):
  require_in_range("ids", convert([0, 4]), low=0, high=5)
  for wrong in (-1, 5):
    for refuse in (require_in_range, check_in_range):
      message = f"^ids: {wrong}; valid: 0 <= id < 5$"
      with pytest.raises(InputError, match=message):
        refuse("ids", convert([0, wrong, 7]), low=0, high=5)


def test_scalars_and_empty_arrays():
  require_in_range("ids", 4, low=0, high=5)
  require_in_range("ids", np.zeros((0, 3), int), low=0, high=5)
  assert jax.jit(ranged)(jnp.zeros((0, 3), int)).shape == (0, 3)
  with pytest.raises(InputError, match=r"^ids: 5; valid"):
    require_in_range("ids", 5, low=0, high=5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_bounds_beyond_the_dtype(dtype):
  ids = np.array([0, 127], dtype)
  check = lambda x: check_in_range("ids", x, low=-1000, high=1000)
  for convert in (np.asarray, jnp.asarray):
    check(convert(ids))
  checked = checkify.checkify(check, errors=checkify.user_checks)
  error, _ = jax.jit(checked)(ids)
  error.throw()


@pytest.mark.parametrize("ids", [[[0, 4]], [[0, 5]], [[-1, 2]], 3, 5])
def test_traced_ids(ids):
  values = np.asarray(ids)
  error, _ = CHECKED(jnp.asarray(ids))
  wrong = values[(values < 0) | (values >= 5)]
  if wrong.size:
    message = f"ids: {wrong[0]}; valid: 0 <= id < 5"
    with pytest.raises(checkify.JaxRuntimeError, match=message):
      error.throw()
  else:
    error.throw()


def test_a_plain_jit_does_not_check():
  np.testing.assert_array_equal(jax.jit(required)(jnp.array([7])), [7])


def test_transformed_ids():
  ids = jnp.arange(8).reshape(2, 4)
  functions = {
    "vmap": jax.vmap(ranged),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c, ranged(y)), 0, x)[1],
    "grad": lambda x: jax.grad(lambda w: w * jnp.sum(ranged(x)))(1.0),
  }
  for function in functions.values():
    checked = checkify.checkify(function, errors=checkify.user_checks)
    error, _ = jax.jit(checked)(ids)
    with pytest.raises(checkify.JaxRuntimeError, match=r"ids: [5-7]; valid"):
      error.throw()
    error, _ = jax.jit(checked)(ids % 5)
    error.throw()
