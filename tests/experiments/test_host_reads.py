"""Ways from host memory to the device, at tiny sizes; no time judged."""

import numpy as np
import pytest

from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.quantization import RowFormat
from experiments.benchmarks import fixtures, host_reads

FORMAT = RowFormat("fp8", 32)


@pytest.fixture(scope="module")
def tables():
  return fixtures.make_rows(dict.fromkeys(host_reads.LAYERS, 500), FORMAT)


def test_every_way_is_measured(tables):
  result = host_reads.compare(tables, FORMAT, ids=[8, 40], repeats=1)
  assert result["left_out"] == {}
  assert [point["ids"] for point in result["points"]] == [8, 40]
  for point in result["points"]:
    assert list(point["ms"]) == ["device", "pinned", "sent", "callback"]
    assert point["fastest"] in ("pinned", "sent", "callback")


def test_a_way_that_is_not_taken_is_said_so(tables, monkeypatch):
  def refuse(*arguments):
    raise NotImplementedError("no such memory\nhere")

  monkeypatch.setattr(host_reads, "PinnedStore", refuse)
  result = host_reads.compare(tables, FORMAT, ids=[8], repeats=1, device=False)
  assert result["left_out"] == {"pinned": "NotImplementedError: no such memory"}
  assert list(result["points"][0]["ms"]) == ["sent", "callback"]


def test_other_numbers_are_an_error(tables, monkeypatch):
  plain = HostStore.copy_rows

  def wrong(self, layer, ids, out):
    plain(self, layer, ids, out)
    out ^= 1

  monkeypatch.setattr(HostStore, "copy_rows", wrong)
  with pytest.raises(RuntimeError, match=r"^sent: other numbers than device$"):
    host_reads.compare(tables, FORMAT, ids=[8], repeats=1)


def test_ids_are_in_range_and_repeat():
  ids = fixtures.draw_ids("zipf", (2, 5000), 1000)
  assert ids.min() >= 0 and ids.max() < 1000
  assert (ids[0] != ids[1]).any()
  _, counts = np.unique(ids, return_counts=True)
  assert counts.max() > 10 * np.median(counts)
