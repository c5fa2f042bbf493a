"""What a compiled program computes and moves, loops included.

Of each operation that a program runs, times how often it does (`hlo`):

  FLOPs    2 per multiply-add of its dots and convolutions; nothing else. TPUs
           write a dot as a convolution
  bytes    what it reads and writes: of an operand that it reads slices or rows
           of, these; of one that it writes into in place, what it writes
  seconds  max(FLOPs / peak FLOP/s, bytes / bandwidth of the main memory)
  cycles   those by which XLA:TPU's own model chose how to compile it

The seconds are a bound from below: every operation at the chip's peak, one
after the other. Without loops they are `optimal_seconds` of XLA's own cost
analysis, by the same rates (`RATES`), but for three things: XLA counts an
asynchronous copy where it starts and where it ends, calls of kernels not at
all, and of a row that a gather or scatter touches the eight rows of its tile.

The cycles are another thing. For products they say how well the matrix units
are filled: 92 to 94 % of the peak for a large one on a v5p, 78 % on a v6e.
Elementwise operations they take for two to seven times slower than the memory
is. XLA says none of rows gathered and scattered, sorts, calls, collectives and
asynchronous copies: the bytes of these are reported apart.

Neither knows of links between chips, of what runs at the same time, or of how
long a sort takes.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from engram_jax.analysis import hlo


class Rates(NamedTuple):
  """What one device of a kind does at most.

  Attributes:
    flops: FLOP/s of its matrix units in bfloat16.
    bandwidth: bytes/s of its main memory.
    clock: Hz, of `estimated_cycles`.
  """

  flops: float
  bandwidth: float
  clock: float


#: Per generation of TPU what XLA:TPU's cost analysis reckons with (libtpu
#: 0.0.42), found from one product of 16,384^3 and one sum of as many numbers.
#: The data sheets say more of some, 459e12 and 2.77e12 of a v5p; the clock is
#: theirs, FLOP/s over those that all matrix units do in a cycle.
RATES = {
  "v4": Rates(137e12, 4.91e11, 1.05e9),
  "v5e": Rates(197e12, 7.38e11, 1.5e9),
  "v5p": Rates(394e12, 2.35e12, 1.75e9),
  "v6e": Rates(918e12, 1.638e12, 1.75e9),
}


class Operation(NamedTuple):
  """One instruction that the program runs, its fusion's inside included.

  Attributes:
    name: the instruction's.
    op_name: what it comes from, e.g. `jit(step)/while/body/dot_general`; empty
      where XLA does not say.
    opcode: e.g. `fusion`.
    times: executions in one run of the program.
    flops: floating-point operations of one execution.
    bytes: bytes read and written by one execution.
    cycles: cycles of one execution, None where XLA does not say.
  """

  name: str
  op_name: str
  opcode: str
  times: int
  flops: int
  bytes: int
  cycles: int | None

  def seconds(self, rates: Rates) -> float:
    """Of all executions, at the device's peak."""
    one = max(self.flops / rates.flops, self.bytes / rates.bandwidth)
    return self.times * one


class Work(NamedTuple):
  """What a program does.

  Attributes:
    program: as it was parsed.
    times: executions of each of its computations; see `hlo.Executions`.
    operations: those that run, in no order that means anything.
    unknown_loops: names of loops counted once; see `hlo.Executions`.
    conditionals: how many there are, of which the larger branch counts.
  """

  program: hlo.Program
  times: dict[str, int]
  operations: tuple[Operation, ...]
  unknown_loops: tuple[str, ...]
  conditionals: int


@functools.lru_cache(maxsize=2)  # several questions about one long text
def work(text: str, unknown_turns: int = 1) -> Work:
  """Reads what a program does from its text; see `hlo.executions`.

  Args:
    text: `as_text()` of a compiled program.
    unknown_turns: number of turns of a loop whose count the text does not tell.
  """
  program = hlo.parse(text)
  inside = _Reader(program)
  found = hlo.executions(program, inside.own_cost, unknown_turns=unknown_turns)
  operations = []
  for name, times in found.times.items():
    if not times or name in inside.fused:
      continue
    computation = program.computations[name]
    for instruction in computation.values():
      if _runs(instruction):
        op_name = _OP_NAME.search(instruction.attributes)
        operations.append(
          Operation(
            name=instruction.name,
            op_name=op_name.group(1) if op_name else "",
            opcode=instruction.opcode,
            times=times,
            flops=inside.flops(instruction, computation),
            bytes=inside.bytes(instruction, computation),
            cycles=_cycles(instruction),
          )
        )
  return Work(
    program,
    found.times,
    tuple(operations),
    found.unknown_loops,
    found.conditionals,
  )


_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
#: What XLA writes for more cycles than it can count, or for none that it knows.
_NO_CYCLES = 2**63 - 1


def _cycles(instruction: hlo.Instruction) -> int | None:
  found = _CYCLES.search(instruction.attributes)
  if found is None or int(found.group(1)) >= _NO_CYCLES:
    return None
  return int(found.group(1))


_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_DIMS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_BATCH_GROUPS = re.compile(r"\bbatch_group_count=(\d+)")
_CONTRACTING = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")

#: What names, joins or takes apart, or calls what is counted by itself.
_IDLE = frozenset(
  "parameter constant tuple get-tuple-element bitcast while conditional call "
  "after-all opt-barrier partition-id replica-id add-dependency domain "
  "async-start".split()
)


def _runs(instruction: hlo.Instruction) -> bool:
  opcode = instruction.opcode
  return opcode not in _IDLE and not opcode.endswith(("-done", "-update"))


class _Reader:
  """FLOPs and bytes of a program's instructions."""

  def __init__(self, program: hlo.Program):
    self._computations = program.computations
    self._flops: dict[str, int] = {}
    self.fused = {
      called
      for computation in program.computations.values()
      for instruction in computation.values()
      if instruction.opcode == "fusion"
      for called in _CALLS.findall(instruction.attributes)
    }

  def own_cost(self, name: str) -> tuple[int, int]:
    """FLOPs and bytes of a computation's own instructions."""
    computation = self._computations.get(name, {})
    flops = sum(_flops(i, computation) for i in computation.values())
    if name in self.fused:
      return flops, 0
    running = filter(_runs, computation.values())
    return flops, sum(self.bytes(i, computation) for i in running)

  def flops(
    self,
    instruction: hlo.Instruction,
    computation: Mapping[str, hlo.Instruction],
  ) -> int:
    """Of one execution, with what a fusion has inside."""
    if instruction.opcode != "fusion":
      return _flops(instruction, computation)
    (name,) = _CALLS.findall(instruction.attributes)
    if name not in self._flops:
      inside = self._computations[name]
      self._flops[name] = sum(self.flops(i, inside) for i in inside.values())
    return self._flops[name]

  def bytes(
    self,
    instruction: hlo.Instruction,
    computation: Mapping[str, hlo.Instruction],
  ) -> int:
    """Of one execution: what it reads and what it writes."""
    operands = hlo.operand_arrays(instruction, computation)
    if instruction.opcode == "fusion":
      (name,) = _CALLS.findall(instruction.attributes)
      inside = self._computations[name]
      parameters = {
        int(i.operands[0]): i.name
        for i in inside.values()
        if i.opcode == "parameter"
      }
      read = sum(
        self._read(inside, parameters[n])
        for n in range(len(operands))
        if n in parameters
      )
      root = next(i for i in inside.values() if i.root)
      return read + self._written(inside, root)
    read = sum(_share(instruction, n, operands) for n in range(len(operands)))
    return read + _result_bytes(instruction, operands)

  def _read(self, inside: Mapping[str, hlo.Instruction], name: str) -> int:
    """Bytes that a fusion reads of what has this name within it."""
    whole = _bytes(hlo.arrays(inside[name].type))
    total = 0
    for user in inside.values():
      for n, operand in enumerate(user.operands):
        if operand != name or user.opcode == "parameter":
          continue
        if user.opcode == "bitcast":
          total += whole if user.root else self._read(inside, user.name)
        elif user.opcode == "fusion":
          (called,) = _CALLS.findall(user.attributes)
          nested = self._computations[called]
          parameter = next(
            i.name
            for i in nested.values()
            if i.opcode == "parameter" and int(i.operands[0]) == n
          )
          total += self._read(nested, parameter)
        else:
          total += _share(user, n, hlo.operand_arrays(user, inside))
        if total >= whole:
          return whole
    return total

  def _written(
    self, inside: Mapping[str, hlo.Instruction], root: hlo.Instruction
  ) -> int:
    """Bytes that a fusion writes for this result."""
    if root.opcode == "tuple":
      return sum(self._written(inside, inside[n]) for n in root.operands)
    if root.opcode == "bitcast" and root.operands[0] in inside:
      return self._written(inside, inside[root.operands[0]])
    return _result_bytes(root, hlo.operand_arrays(root, inside))


def _bytes(arrays: Iterable[hlo.Array]) -> int:
  return sum(map(hlo.size, arrays))


def _share(
  user: hlo.Instruction, n: int, operands: list[tuple[hlo.Array, ...]]
) -> int:
  """Bytes that an instruction reads of its operand `n`."""
  if n == 0:
    if user.opcode in ("dynamic-slice", "slice", "gather"):
      return _bytes(hlo.arrays(user.type))
    if user.opcode == "dynamic-update-slice":
      return 0
    if user.opcode == "scatter":
      return _bytes(operands[-1])
  return _bytes(operands[n])


def _result_bytes(
  instruction: hlo.Instruction, operands: list[tuple[hlo.Array, ...]]
) -> int:
  """Bytes that an instruction writes."""
  if instruction.opcode == "dynamic-update-slice":
    return _bytes(operands[1])
  if instruction.opcode == "scatter":
    return _bytes(operands[-1])
  return _bytes(hlo.result_arrays(instruction))


def _flops(
  instruction: hlo.Instruction, computation: Mapping[str, hlo.Instruction]
) -> int:
  """Of one dot or convolution; 0 of anything else."""
  if instruction.opcode == "dot":
    (left,), _ = hlo.operand_arrays(instruction, computation)[:2]
    dims = _CONTRACTING.search(instruction.attributes)
    contracted = [int(d) for d in dims.group(1).split(",") if d] if dims else []
    (result,) = hlo.arrays(instruction.type)
    sizes = [left.shape[d] for d in contracted]
    return 2 * math.prod(result.shape) * math.prod(sizes)
  if instruction.opcode == "convolution":
    return _convolution_flops(instruction, computation)
  return 0


def _convolution_flops(
  instruction: hlo.Instruction, computation: Mapping[str, hlo.Instruction]
) -> int:
  """2 per multiply-add of kernel and input, those with padding left out."""
  (left,), (right,) = hlo.operand_arrays(instruction, computation)[:2]
  (result,) = hlo.arrays(instruction.type)
  lhs, rhs, out = _DIMS.search(instruction.attributes).groups()
  groups = _BATCH_GROUPS.search(instruction.attributes)
  batches = int(groups.group(1)) if groups else 1
  total = right.shape[rhs.index("i")] * right.shape[rhs.index("o")]
  total *= left.shape[lhs.index("b")] // batches
  window = {
    name: _window(instruction.attributes, name)
    for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
  }
  for d in range(len(lhs) - 2):
    label = str(d)

    def entry(name, d=d):
      return window[name][d] if window[name] else "1"

    pad = window["pad"][d].split("_")[0] if window["pad"] else "0"
    total *= _meetings(
      left.shape[lhs.index(label)],
      right.shape[rhs.index(label)],
      result.shape[out.index(label)],
      int(entry("stride")),
      int(pad),
      int(entry("lhs_dilate")),
      int(entry("rhs_dilate")),
    )
  return 2 * total


def _window(attributes: str, name: str) -> list[str]:
  window = re.search(r"\bwindow=\{([^}]*)\}", attributes)
  found = window and re.search(rf"\b{name}=([\d_x\-]+)", window.group(1))
  return found.group(1).split("x") if found else []


@functools.cache
def _meetings(
  inputs: int,
  kernel: int,
  outputs: int,
  stride: int,
  pad: int,
  lhs_dilate: int,
  rhs_dilate: int,
) -> int:
  """Pairs of a kernel's and an output's place that meet an input's."""
  count, first = 0, np.arange(outputs) * stride - pad
  for k in range(kernel):
    place = first + k * rhs_dilate
    inside = (place >= 0) & (place <= (inputs - 1) * lhs_dilate)
    count += int(np.sum(inside & (place % lhs_dilate == 0)))
  return count
