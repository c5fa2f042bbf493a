"""What a compiled program holds, computes and sends, read without running it.

For any executable of `jax.jit(f).lower(...).compile()`, also one for devices
that this machine does not have. Everything is per device: a program is compiled
once, and each device runs it on its own part. Loops count as often as they turn
(`hlo`), which XLA's own cost analysis does not do.

  memory_report   bytes of arguments, results and temporaries
  collectives     what is sent between devices: kind, dtype, shape, bytes, times
  copies          what is copied within one
  cost            FLOPs, bytes read and written, and estimates of the time
  top_operations  what takes most of it
  largest_temporaries  what fills the memory of a TPU that is too small
"""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engram_jax.analysis import estimates, hlo

#: The operations that send arrays between devices.
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)


def memory_report(compiled: Any) -> dict[str, int]:
  """Bytes on one device.

  Args:
    compiled: a `jax.stages.Compiled`.

  Returns:
    `argument`, `output`, `alias` (results written over donated arguments, which
    count in both), `temp`, `code`; `total`, argument + output - alias + temp +
    code; and `peak`, the most that lives at one time as XLA says it. What a TPU
    takes lies between the two, for arrays lie in memory with gaps; for CPUs XLA
    leaves the temporaries out of the peak.
  """
  found = compiled.memory_analysis()
  report = {
    name: int(getattr(found, f"{field}_size_in_bytes"))
    for name, field in (
      ("argument", "argument"),
      ("output", "output"),
      ("alias", "alias"),
      ("temp", "temp"),
      ("code", "generated_code"),
    )
  }
  total = sum(report.values()) - 2 * report["alias"]
  peak = int(getattr(found, "peak_memory_in_bytes", total))
  return {**report, "total": total, "peak": peak}


def cost(
  program: Any,
  rates: estimates.Rates | None = None,
  *,
  unknown_turns: int = 1,
) -> dict[str, float | int | None]:
  """What the program costs on one device, loops included.

  Args:
    program: a `jax.stages.Compiled`, or its `as_text()`.
    rates: peak rates of the device; None leaves out the seconds.
    unknown_turns: how often a loop turns where the text does not tell.

  Returns:
    `flops`, of dots and convolutions; `bytes_accessed`; `optimal_seconds`, the
    sum over operations of their time at the device's peak rates, and
    `compiler_seconds`, that of the cycles by which XLA:TPU compiled them
    (`estimates` says what either is not). The second leaves out operations
    without cycles: `unpriced_bytes` is what these move, `unpriced_seconds` how
    long that takes at the peak, and `unpriced_share` is of all bytes.
    `unknown_loops` is how many loops took `unknown_turns`, `conditionals` how
    many counted by their larger branch. The seconds are None without `rates`,
    and `compiler_seconds` where XLA says no cycles, as on CPUs.
  """
  work = estimates.work(_text(program), unknown_turns)
  every = work.operations
  unpriced = [o for o in every if o.cycles is None]
  cycles = sum(o.times * o.cycles for o in every if o.cycles is not None)
  moved = sum(o.times * o.bytes for o in every)
  unpriced_bytes = sum(o.times * o.bytes for o in unpriced)
  return {
    "flops": sum(o.times * o.flops for o in every),
    "bytes_accessed": moved,
    "optimal_seconds": rates and sum(o.seconds(rates) for o in every),
    "compiler_seconds": cycles / rates.clock if rates and cycles else None,
    "unpriced_bytes": unpriced_bytes,
    "unpriced_share": unpriced_bytes / moved if moved else 0.0,
    "unpriced_seconds": rates and sum(o.seconds(rates) for o in unpriced),
    "unknown_loops": len(work.unknown_loops),
    "conditionals": work.conditionals,
  }


def top_operations(
  program: Any, rates: estimates.Rates, *, count: int, unknown_turns: int = 1
) -> list[dict[str, Any]]:
  """The operations that take most of the time, the greatest first.

  Args:
    program: a `jax.stages.Compiled`, or its `as_text()`.
    rates: peak rates of the device.
    count: largest number of operations to return.
    unknown_turns: as for `cost`.

  Returns:
    Per operation the fields of `estimates.Operation`, `seconds` of all its
    executions at the peak, by which they are ordered, and `compiler_seconds`,
    None where XLA says no cycles.
  """

  def described(operation):
    cycles = operation.cycles
    return operation._asdict() | {
      "seconds": operation.seconds(rates),
      "compiler_seconds": cycles and operation.times * cycles / rates.clock,
    }

  every = estimates.work(_text(program), unknown_turns).operations
  every = sorted(every, key=lambda o: -o.seconds(rates))
  return [described(operation) for operation in every[:count]]


#: A line of libtpu's list: running total; size; offset; values; shapes.
_BUFFER = re.compile(
  r"\s*[\d.]+\w+\(\s*\d+%\);\s*([\d.]+)([KMGT]?)i?B;\s*\d+;\s*\d+; (.+)"
)


def largest_temporaries(log: str) -> list[dict[str, Any]]:
  """What fills a memory that is too small, as libtpu's log lists it.

  Args:
    log: what libtpu wrote to standard error as it refused the program
      (`TPU_STDERR_LOG_LEVEL=2`, before it is loaded).

  Returns:
    Per place in memory `bytes` and `shapes`, of the arrays that share it one
    after the other; the largest first. Empty if the log has no such list.
  """
  _, _, report = log.rpartition("Memory usage report:")
  # First what shares one allocation; then each argument and result, alone.
  _, _, shared = report.partition("shapes_list")
  shared, _, _ = shared.partition("shapes_list")
  found = [
    {
      "bytes": round(float(count) * 1024 ** " KMGT".index(unit or " ")),
      "shapes": shapes,
    }
    for count, unit, shapes in _BUFFER.findall(shared)
  ]
  return sorted(found, key=lambda buffer: -buffer["bytes"])


# --- what moves ---


#: On TPUs an asynchronous collective is written where it starts, in each
#: computation that runs beside it, and where it ends; -1 marks the start.
_CONTINUES = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')


class Movement(NamedTuple):
  """One way in which a program moves arrays, and how often.

  An operation takes arrays and gives arrays. Those of the larger side count,
  as they are on one device: an all-gather's result, a reduce-scatter's operand,
  either of an all-to-all or all-reduce.

  Attributes:
    kind: one of `COLLECTIVES`, or `copy`.
    dtype: dtype of the largest array as XLA writes it, e.g. `bf16`.
    shape: shape of the largest array.
    bytes: size of all arrays of one such operation.
    count: operations of this kind with these arrays in the program's text.
    times: executions of all of them in one run of the program; see `hlo`.
    arrays: (dtype, shape) of all arrays. XLA joins small reductions, and may
      split an all-to-all into one array per device.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  bytes: int
  count: int
  times: int
  arrays: tuple[hlo.Array, ...]

  @property
  def in_loop(self) -> bool:
    """Whether a loop runs it again and again."""
    return self.times > self.count


def collectives(program: Any) -> list[Movement]:
  """What a compiled program sends between devices, most bytes first.

  Args:
    program: a `jax.stages.Compiled`, or its `as_text()`. An asynchronous
      operation counts once, in whatever number of pieces it is written.
  """
  return _movements(program, COLLECTIVES)


def copies(program: Any) -> list[Movement]:
  """What it copies within a device, as it is or into another layout.

  An array that is to be written in place must not be among these.
  """
  return _movements(program, ("copy",))


def collective_bytes(records: Iterable[Movement]) -> dict[str, int]:
  """Bytes per kind in one run of the program, loops included."""
  total = collections.Counter()
  for record in records:
    total[record.kind] += record.bytes * record.times
  return dict(total)


def collective_counts(records: Iterable[Movement]) -> dict[str, int]:
  """Operations per kind in the program's text."""
  total = collections.Counter()
  for record in records:
    total[record.kind] += record.count
  return dict(total)


def of_table(
  records: Iterable[Movement], *, rows: int, width: int, devices: int
) -> list[Movement]:
  """Those that move a whole table or devices' parts of it, in any shape.

  Args:
    records: from `collectives` or `copies`.
    rows: R, padding included.
    width: d.
    devices: n, that share the rows.
  """
  shard = rows // devices * width

  def is_table(shape: Sequence[int]) -> bool:
    parts, rest = divmod(math.prod(shape), shard)
    return rest == 0 and 1 <= parts <= devices

  return [r for r in records if any(is_table(shape) for _, shape in r.arrays)]


def _movements(program: Any, kinds: Sequence[str]) -> list[Movement]:
  """The operations of these kinds, alike ones together."""
  work = estimates.work(_text(program))
  counts, runs = collections.Counter(), collections.Counter()
  for name, computation in work.program.computations.items():
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in kinds and not _CONTINUES.search(instruction.attributes):
        times = work.times[name]
        key = kind, _larger_side(instruction, computation), times > 1
        counts[key] += 1
        runs[key] += times
  records = []
  for key, count in counts.items():
    kind, arrays, _ = key
    dtype, shape = max(arrays, key=hlo.size)
    size = sum(map(hlo.size, arrays))
    records.append(Movement(kind, dtype, shape, size, count, runs[key], arrays))
  return sorted(records, key=lambda r: (-r.bytes, r.kind, r.arrays))


def _larger_side(
  instruction: hlo.Instruction, computation: Mapping[str, hlo.Instruction]
) -> tuple[hlo.Array, ...]:
  """The arrays that go in or those that come out, whichever are more bytes."""
  operands = hlo.operand_arrays(instruction, computation)
  sides = hlo.result_arrays(instruction), tuple(itertools.chain(*operands))
  return max(sides, key=lambda arrays: sum(map(hlo.size, arrays)))


def _text(program: Any) -> str:
  return program if isinstance(program, str) else program.as_text()
