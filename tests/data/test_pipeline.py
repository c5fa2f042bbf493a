"""Tests of windows and batches."""

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from engram_jax.data.pipeline import (
  PackedWindows,
  batches,
  held_out_batches,
  windows,
)
from engram_jax.data.text_dataset import read_index, read_pieces
from engram_jax.errors import InputError
from engram_jax.types import Break


def packed(documents, *, seq_len, piece=3, **kwargs):
  """Windows over documents given as lists of tokens."""
  pieces, starts, position = [], [], 0
  for document in documents:
    starts.append(position)
    position += len(document)
    cuts = range(0, len(document), piece)
    pieces += [document[cut : cut + piece] for cut in cuts]
  pieces = [{"tokens": np.array(p, np.int32)} for p in pieces]
  return PackedWindows(
    pieces,
    piece_ends=np.cumsum([len(p["tokens"]) for p in pieces]),
    document_starts=np.array(starts, np.int64),
    seq_len=seq_len,
    **kwargs,
  )


def stream(prepared, split):
  pieces = read_pieces(prepared.folder, splits=[split])
  tokens = np.concatenate([piece["tokens"] for piece in pieces])
  is_start = np.zeros(len(tokens), bool)
  is_start[read_index(prepared.folder, split)[1]] = True
  return tokens, is_start


def take(dataset, count):
  return list(itertools.islice(iter(dataset), count))


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], strict=True)


def rows(batch):
  """Hashable windows of a batch."""
  return [row.tobytes() for row in batch["inputs"]]


def test_windows_by_hand():
  #             0   1   2   3   4   5   6   7   8   9  10
  documents = [[10, 11, 12, 13, 1], [20, 1], [30, 31, 32, 1]]
  source = packed(documents, seq_len=4)
  assert len(source) == source.windows == 2 and source.tokens == 11
  first, second = source[0], source[1]
  assert first["inputs"].tolist() == [10, 11, 12, 13]
  assert first["targets"].tolist() == [11, 12, 13, 1]
  assert first["breaks"].tolist() == [1, 0, 0, 0]
  assert first["loss_mask"].tolist() == [True, True, True, True]
  # Begins at the last token of a document and holds the starts of two more.
  assert second["inputs"].tolist() == [1, 20, 1, 30]
  assert second["targets"].tolist() == [20, 1, 30, 31]
  assert second["breaks"].tolist() == [0, 1, 0, 1]
  assert second["loss_mask"].tolist() == [False, True, False, True]
  assert {k: v.dtype.name for k, v in first.items()} == {
    "inputs": "int32",
    "targets": "int32",
    "breaks": "int8",
    "loss_mask": "bool",
  }
  with pytest.raises(IndexError):
    source[2]


def test_a_text_shorter_than_a_window_is_padded():
  documents = [[10, 11, 1], [20, 21, 1]]
  with pytest.raises(InputError, match=r"^seq_len: 8; valid: at most 5: there"):
    packed(documents, seq_len=8)
  source = packed(documents, seq_len=8, tail=True, multiple_of=2)
  assert (source.windows, len(source)) == (1, 2)
  window = source[0]
  assert window["inputs"].tolist() == [10, 11, 1, 20, 21, 0, 0, 0]
  assert window["targets"].tolist() == [11, 1, 20, 21, 1, 0, 0, 0]
  assert window["breaks"].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
  assert (
    window["loss_mask"].tolist()
    == [True] * 2 + [False] + [True] * 2 + [False] * 3
  )
  assert not source[1]["loss_mask"].any()


@pytest.mark.parametrize("seq_len", range(1, 8))
def test_with_its_tail_every_token_counts_once(seq_len):
  documents = [[10, 11, 12, 1], [20, 1]]
  source = packed(documents, seq_len=seq_len, tail=True)
  counted = [
    token
    for window in source
    for token in window["targets"][window["loss_mask"]].tolist()
  ]
  assert counted == [11, 12, 1, 1]


def test_held_out_batches_of_a_short_split(prepared):
  tokens = prepared.splits["validation"].tokens
  options = dict(seq_len=tokens + 5, batch_size=2)
  (batch,) = held_out_batches(prepared, "validation", **options)
  assert batch["inputs"].shape == (2, tokens + 5)
  documents = prepared.splits["validation"].documents
  assert batch["loss_mask"].sum() == tokens - documents
  with pytest.raises(InputError, match=r"^seq_len: "):
    held_out_batches(prepared, "validation", tail=False, **options)
  # Of a longer split the tail counts only if it is asked for.
  options = dict(seq_len=tokens // 3 * 2, batch_size=2)
  for tail, windows_ in ((None, 1), (True, 2)):
    (batch,) = held_out_batches(prepared, "validation", tail=tail, **options)
    assert batch["loss_mask"].any(axis=1).sum() == windows_
  with pytest.raises(InputError, match=r"^tail: True; valid: False with drop"):
    batches(prepared, "train", seq_len=8, batch_size=2, tail=True)


def test_a_window_that_ends_where_a_document_does():
  source = packed([[10, 11, 12, 1], [20, 21, 22, 23, 1]], seq_len=4)
  # The last target is the first token of the next document.
  assert source[0]["targets"].tolist() == [11, 12, 1, 20]
  assert source[0]["loss_mask"].tolist() == [True, True, True, False]
  assert source[1]["breaks"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("piece", (1, 2, 5, 100))
@pytest.mark.parametrize("seq_len", (1, 3, 7, 44))
def test_windows_are_the_stream(piece, seq_len):
  rng = np.random.default_rng(0)
  documents = [
    [*rng.integers(2, 99, size=n), 1] for n in (0, 5, 1, 12, 3, 0, 0, 17)
  ]
  flat = np.concatenate(documents)
  source = packed(documents, seq_len=seq_len, piece=piece)
  whole = [source[i] for i in range(len(source))]
  count = (len(flat) - 1) // seq_len * seq_len
  for key, begin in (("inputs", 0), ("targets", 1)):
    joined = np.concatenate([window[key] for window in whole])
    np.testing.assert_array_equal(joined, flat[begin : begin + count])
  is_start = np.concatenate(
    [[True] + [False] * (len(d) - 1) for d in documents]
  )
  breaks = np.concatenate([window["breaks"] for window in whole])
  mask = np.concatenate([window["loss_mask"] for window in whole])
  np.testing.assert_array_equal(
    breaks == Break.DOCUMENT_START, is_start[:count]
  )
  np.testing.assert_array_equal(mask, ~is_start[1 : count + 1])
  np.testing.assert_array_equal(source.read(0, len(flat)), flat)


def test_validation_is_the_stream_in_order(prepared):
  tokens, is_start = stream(prepared, "validation")
  seq_len, batch_size = 32, 4
  options = {"seq_len": seq_len, "batch_size": batch_size, "shuffle": False}
  found = list(
    batches(prepared, "validation", **options, epochs=1, drop_remainder=False)
  )
  count = (len(tokens) - 1) // seq_len
  joined = {
    key: np.concatenate([batch[key] for batch in found]) for key in found[0]
  }
  assert len(joined["inputs"]) == -(-count // batch_size) * batch_size
  np.testing.assert_array_equal(
    joined["targets"][:count].ravel(), tokens[1 : count * seq_len + 1]
  )
  np.testing.assert_array_equal(
    joined["breaks"][:count].ravel() == 1, is_start[: count * seq_len]
  )
  assert not joined["loss_mask"][count:].any()
  assert not joined["targets"][count:].any()
  dropped = list(batches(prepared, "validation", **options, epochs=1))
  assert_equal(dropped, found[: count // batch_size])


def test_all_is_one_split_after_the_other(prepared):
  both = windows(prepared, "all", seq_len=64)
  tokens = [stream(prepared, split) for split in ("train", "validation")]
  flat = np.concatenate([t for t, _ in tokens])
  is_start = np.concatenate([s for _, s in tokens])
  np.testing.assert_array_equal(both.read(0, len(flat)), flat)
  breaks = np.concatenate([both[i]["breaks"] for i in range(len(both))])
  np.testing.assert_array_equal(breaks == 1, is_start[: len(breaks)])


def test_epochs_are_shuffled_anew_and_complete(prepared):
  count = len(windows(prepared, "train", seq_len=128))
  options = {"seq_len": 128, "batch_size": 1}
  two = [
    rows(b)[0] for b in take(batches(prepared, "train", **options), 2 * count)
  ]
  first, second = two[:count], two[count:]
  assert sorted(first) == sorted(second)
  assert first != second
  straight = batches(prepared, "train", **options, shuffle=False, epochs=1)
  assert sorted(first) == sorted(rows(b)[0] for b in straight)
  other = take(batches(prepared, "train", **options, seed=1), count)
  assert [rows(b)[0] for b in other] != first
  same = take(batches(prepared, "train", **options, seed=0), count)
  assert [rows(b)[0] for b in same] == first


def test_state_resumes_exactly(prepared):
  dataset = batches(prepared, "train", seq_len=128, batch_size=4, seed=3)
  count = len(windows(prepared, "train", seq_len=128)) // 4 + 3
  iterator = iter(dataset)
  for _ in range(count):  # into the second epoch
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(5)]
  fresh = iter(batches(prepared, "train", seq_len=128, batch_size=4, seed=3))
  fresh.set_state(state)
  assert_equal([next(fresh) for _ in range(5)], expected)
  iterator.set_state(state)
  assert_equal([next(iterator) for _ in range(5)], expected)


def test_orbax_checkpoint_resumes_exactly(prepared, tmp_path):
  dataset = batches(prepared, "train", seq_len=128, batch_size=4, seed=3)
  iterator = iter(dataset)
  for _ in range(7):
    next(iterator)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(
      7,
      args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)),
    )
    manager.wait_until_finished()
    expected = [next(iterator) for _ in range(4)]
    fresh = iter(dataset)
    manager.restore(
      7,
      args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)),
    )
  assert_equal([next(fresh) for _ in range(4)], expected)


@pytest.mark.parametrize("processes", (2, 4))
def test_hosts_share_the_same_batches(prepared, processes):
  options = {"seq_len": 128, "batch_size": 8, "seed": 5, "epochs": 3}
  whole = list(batches(prepared, "train", **options))
  shares = [
    list(
      batches(
        prepared,
        "train",
        **options,
        process_index=index,
        process_count=processes,
      )
    )
    for index in range(processes)
  ]
  assert {len(share) for share in shares} == {len(whole)}
  for step, batch in enumerate(whole):
    parts = [rows(share[step]) for share in shares]
    assert all(len(part) == 8 // processes for part in parts)
    assert sorted(itertools.chain(*parts)) == sorted(rows(batch))


def test_what_does_not_fit_is_refused(prepared):
  tokens = prepared.splits["validation"].tokens
  ok = {"seq_len": 32, "batch_size": 8}
  for split, changes, message in (
    (
      "validation",
      {"seq_len": tokens},
      f"seq_len: {tokens}; valid: at most "
      f"{tokens - 1}: there are {tokens} tokens.*split validation of /",
    ),
    ("train", {"seq_len": 0}, "seq_len: 0; valid: a number above 0"),
    ("test", {}, "split: test; valid: one of train, validation, all"),
    ("train", {"batch_size": 0}, "batch_size: 0;"),
    ("train", {"process_count": 3}, "batch_size: 8; valid: a multiple of .* 3"),
    ("train", {"process_index": 1}, "process_index: 1;"),
    ("train", {"epochs": 0}, "epochs: 0;"),
    ("train", {"seed": -1}, "seed: -1;"),
    ("train", {"drop_remainder": False}, "drop_remainder: False;"),
    (
      "validation",
      {"epochs": 1, "batch_size": 10**6},
      "batch_size: 1000000; "
      "valid: at most [0-9]+, the windows of seq_len = 32 in 1 epochs",
    ),
  ):
    with pytest.raises(InputError, match=f"^{message}"):
      batches(prepared, split, **(ok | changes))
  longest = windows(prepared, "validation", seq_len=tokens - 1)
  assert len(longest) == 1 and longest[0]["inputs"].shape == (tokens - 1,)
