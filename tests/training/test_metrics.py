"""Tests of the metrics' record: names, crashes, restarts."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from engram_jax.errors import InputError
from engram_jax.training.metrics import MetricsWriter, read_metrics, scalars


def steps(path, kind="train"):
  return [record["step"] for record in read_metrics(path, kind)]


def events(folder):
  """TensorBoard's events of each file, in the order of the files' names."""
  for path in sorted(folder.iterdir()):
    data, found, at = path.read_bytes(), [], 0
    while at < len(data):
      (size,) = struct.unpack_from("<Q", data, at)
      found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
      at += 16 + size  # length, its checksum, the event, its checksum
    yield found


def test_arrays_are_spread_over_stable_names():
  got = scalars(
    {
      "loss": jnp.float32(2.5),
      "finite": jnp.asarray(True),
      "tokens_per_second": 10,
      "norm": jnp.bfloat16(0.5),
      "max_violation": jnp.array([0.25, 0.5]),
      "gate_mean/1": np.array([0.1, 0.2]),
      "gate_mean/14": jnp.array([0.5]),
      "rows_touched/1": jnp.float32(7),
      "nothing": np.zeros(0),
    }
  )
  assert got == {
    "loss": 2.5,
    "finite": 1.0,
    "tokens_per_second": 10.0,
    "norm": 0.5,
    "max_violation/0": 0.25,
    "max_violation/1": 0.5,
    "gate_mean/layer_1/stream_0": 0.1,
    "gate_mean/layer_1/stream_1": 0.2,
    "gate_mean/layer_14/stream_0": 0.5,
    "rows_touched/1": 7.0,
  }
  assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize(
  "metrics",
  [
    {"a": np.zeros((2, 2))},
    {"a": "text"},
    {"a": None},
    {"a": 1j},
    {"a": [0.0], "a/0": 1.0},
  ],
)
def test_values_that_are_no_numbers_or_share_a_name_are_refused(metrics):
  with pytest.raises(InputError, match=r"^(a|metrics):"):
    scalars(metrics)


def test_what_is_written_is_read_by_kind_in_the_order_of_steps(tmp_path):
  with MetricsWriter(tmp_path / "new" / "run") as writer:
    writer.write(0, {"compile_seconds": 1.5}, kind="run")
    writer.write(2, {"loss": 0.1})
    writer.write(1, {"loss": np.float32(0.1)})
    writer.write(2, {"loss": 3.0}, kind="eval")
  assert read_metrics(writer.path, "train") == [
    {"kind": "train", "step": 1, "loss": float(np.float32(0.1))},
    {"kind": "train", "step": 2, "loss": 0.1},
  ]
  assert read_metrics(writer.path, "eval")[0]["loss"] == 3.0
  assert read_metrics(writer.path, "run")[0]["compile_seconds"] == 1.5


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step in (1, 2):
    writer.write(step, {"loss": 1.0}, kind="run")
    assert writer.path.read_bytes().count(b"\n") == step


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
  values = {"a": math.nan, "b": math.inf, "c": -math.inf}
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, values)

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  line = json.loads(writer.path.read_text(), parse_constant=refuse)
  assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
  (record,) = read_metrics(writer.path, "train")
  assert math.isnan(record["a"])
  assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1.0}, kind="run")
  path, whole = writer.path, writer.path.read_bytes()
  first = whole.index(b"\n") + 1
  for end in range(len(whole)):
    path.write_bytes(whole[:end])
    complete = [1] if end >= first else []
    assert steps(path, "run") == complete
    writer = MetricsWriter(tmp_path)
    assert path.read_bytes() == whole[: first if complete else 0]
  writer.write(3, {"loss": 1.0}, kind="run")
  assert steps(path, "run") == [1, 3]


def test_a_torn_line_longer_than_a_chunk_is_cut_off(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"kind": "run", "step": 1}\n' + b"x" * 200_000)
  MetricsWriter(tmp_path)
  assert path.read_bytes() == b'{"kind": "run", "step": 1}\n'


def test_after_a_restart_the_later_record_of_a_step_stands(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": 1.0, "old": 1.0})
  with MetricsWriter(tmp_path) as writer:
    writer.write(4, {"loss": 2.0})
  records = read_metrics(writer.path, "train")
  assert [record["loss"] for record in records] == [1, 1, 1, 2, 1]
  assert "old" not in records[3]


@pytest.mark.parametrize(
  "line",
  [
    b'{"kind": "train", "st',
    b"",
    b"[1]",
    b"1",
    b'{"kind": "train"}',
    b'{"kind": "test", "step": 1}',
    b'{"kind": "train", "step": 1.5}',
    b'{"kind": "train", "step": -1}',
    b'{"kind": "train", "step": 1, "loss": "high"}',
    b'{"kind": "train", "step": 1, "loss": null}',
    b'{"kind": "train", "step": 1, "loss": [1]}',
    b"\xff",
  ],
)
def test_a_broken_line_before_the_end_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  good = b'{"kind": "train", "step": 1, "loss": 1.0}\n'
  path.write_bytes(good + line + b"\n" + good)
  with pytest.raises(InputError, match="line 2"):
    read_metrics(path, "eval")


def test_bad_arguments_are_refused_and_write_nothing(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step, values, kind in (
    (1, {}, "test"),
    (-1, {}, "train"),
    (1, {"step": 1}, "train"),
    (1, {"kind": 1}, "train"),
    (1, {"loss": "high"}, "train"),
  ):
    with pytest.raises(InputError):
      writer.write(step, values, kind=kind)
  assert not writer.path.exists()
  with pytest.raises(InputError, match=r"metrics\.jsonl.*No such file"):
    read_metrics(writer.path, "train")
  with pytest.raises(InputError, match="kind"):
    read_metrics(writer.path, "test")


def test_tensorboard_gets_the_curves_and_purges_steps_run_again(tmp_path):
  for first in (1, 3):
    with MetricsWriter(tmp_path) as writer:
      writer.write(0, {"compile_seconds": 1.0}, kind="run")
      writer.write(first, {"loss": first, "gate_mean/1": [0.5]})
      writer.write(first + 1, {"loss": math.nan}, kind="eval")
  runs = list(events(tmp_path / "tensorboard"))
  assert len(runs) == 2  # the same second, and yet a file of its own
  for first, found in zip((1, 3), runs):
    starts = [e.step for e in found if e.HasField("session_log")]
    assert starts == [first]
    values = [(e.step, v.tag) for e in found for v in e.summary.value]
    assert values == [
      (first, "train/loss"),
      (first, "train/gate_mean/layer_1/stream_0"),
      (first + 1, "eval/loss"),
    ]


def test_a_full_disk_is_one_clear_line_and_no_half_record(tmp_path):
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  writer = MetricsWriter(tmp_path)
  with pytest.raises(
    InputError, match=r"^path: .*metrics\.jsonl; .*(No space|room)"
  ):
    for step in range(100):  # more than any queue holds
      writer.write(step, {"loss": 1.0})
  writer.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_cannot_be_written_is_named(tmp_path, name):
  other = tmp_path / name
  other.mkdir() if name == "metrics.jsonl" else other.write_text("x")
  with pytest.raises(InputError, match=f"^path: .*{name}"):
    with MetricsWriter(tmp_path) as writer:
      writer.write(1, {"loss": 1.0})
