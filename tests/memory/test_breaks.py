"""Breaks from segments, and arrays that are no breaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from engram_jax.errors import InputError
from engram_jax.memory.breaks import breaks_from_segments, require_breaks
from engram_jax.memory.hashing import NgramHash

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
BREAKS = np.array([[1, 0, 0, 1, 0, 1, 2, 2], [1, 0, 0, 0, 0, 0, 0, 0]])
IDS = np.arange(16, dtype=np.int32).reshape(2, 8) % 7


@pytest.fixture(scope="module")
def hashing():
  return NgramHash.create(
    vocab_size=10, rows_per_head=(50, 60), heads=2, layers=(1,), pad_id=0
  )


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_documents_start_where_the_segment_changes(as_array):
  found = breaks_from_segments(as_array(SEGMENTS))
  assert found.dtype == np.int8
  assert isinstance(found, np.ndarray) == (as_array is np.asarray)
  np.testing.assert_array_equal(found, BREAKS)
  traced = jax.jit(breaks_from_segments)(SEGMENTS)
  np.testing.assert_array_equal(traced, BREAKS)


def test_padding_has_the_value_that_it_is_told():
  segments = np.array([[-1, -1, 0, 0, 7]])
  found = breaks_from_segments(segments, padding=-1)
  np.testing.assert_array_equal(found, [[2, 2, 1, 0, 1]])
  found = breaks_from_segments(segments, padding=None)
  np.testing.assert_array_equal(found, [[1, 0, 1, 0, 1]])


def test_positions_part_documents_of_one_segment_and_continue_a_row():
  segments, positions = np.array([[1, 1, 1, 1]]), np.array([[5, 0, 1, 0]])
  found = breaks_from_segments(segments, positions)
  np.testing.assert_array_equal(found, [[0, 1, 0, 1]])


def test_the_hash_takes_segments_and_reads_the_rows_of_each_document(hashing):
  ids = jnp.asarray(IDS)
  found = hashing.row_ids(ids, 1, segment_ids=jnp.asarray(SEGMENTS))
  expected = hashing.row_ids(ids, 1, breaks=jnp.asarray(BREAKS))
  np.testing.assert_array_equal(found, expected)
  every = hashing.hash(ids, segment_ids=jnp.asarray(SEGMENTS))
  np.testing.assert_array_equal(every[1], expected)
  on_host = hashing.row_ids_numpy(IDS, 1, segment_ids=SEGMENTS)
  np.testing.assert_array_equal(on_host, expected)
  # The second document by itself.
  alone = hashing.row_ids(ids[:1, 3:5], 1)
  np.testing.assert_array_equal(found[:1, 3:5], alone)
  np.testing.assert_array_equal(
    hashing.next_history(ids, segment_ids=jnp.asarray(SEGMENTS)),
    hashing.next_history(ids, breaks=jnp.asarray(BREAKS)),
  )


@pytest.mark.usefixtures("types_unchecked")
def test_breaks_and_segments_together_are_refused(hashing):
  for form in (hashing.row_ids, hashing.row_ids_numpy):
    with pytest.raises(InputError, match="segment_ids: given with breaks"):
      form(IDS, 1, breaks=BREAKS, segment_ids=SEGMENTS)


@pytest.mark.parametrize(
  "breaks",
  [
    SEGMENTS,
    [[3, 0, 0, 0, 0, 0, 0, 0], [0] * 8],
    [[-1, 0, 0, 0, 0, 0, 0, 0], [0] * 8],
    [[257, 0, 0, 0, 0, 0, 0, 0], [0] * 8],
    # By their values breaks, and yet segments.
    [[1, 1, 1, 1, 2, 2, 2, 2], [1] * 8],
    [[1, 1, 1, 2, 2, 2, 0, 0], [0] * 8],
  ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_breaks_is_refused_outside_jit(hashing, breaks):
  breaks = np.array(breaks, np.int32)
  for array in (breaks, jnp.asarray(breaks)):
    with pytest.raises(InputError, match=r"^breaks: .*segment_ids="):
      require_breaks(array)
    with pytest.raises(InputError, match=r"^breaks: "):
      hashing.row_ids(jnp.asarray(IDS), 1, breaks=array)
  with pytest.raises(InputError, match=r"^breaks: "):
    hashing.row_ids_numpy(IDS, 1, breaks=breaks)
  with pytest.raises(InputError, match=r"^breaks: "):
    hashing.next_history(jnp.asarray(IDS), breaks=jnp.asarray(breaks))


@pytest.mark.usefixtures("types_unchecked")
def test_breaks_of_other_dtypes():
  require_breaks(np.array([[True, True, True, False]]))
  # int8 is what breaks are made of: any row of them is taken at its word.
  require_breaks(np.array([[1, 1, 1, 2]], np.int8))
  with pytest.raises(InputError, match="dtype float32"):
    require_breaks(np.zeros((1, 4), np.float32))


def test_inside_jit_checkify_finds_them(hashing):
  check = checkify.checkify(
    lambda ids, breaks: hashing.validate(ids, breaks=breaks),
    errors=checkify.user_checks,
  )
  assert jax.jit(check)(IDS, BREAKS)[0].get() is None
  assert "breaks: 4" in jax.jit(check)(IDS, SEGMENTS)[0].get()
