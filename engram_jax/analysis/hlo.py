"""The text of a compiled program: its computations, and how often each runs.

XLA writes a program as computations, each a list of instructions

  %name = type opcode(%operand, ...), attribute=..., calls=%computation

and a loop is one instruction, `while`, of two of them. XLA's own cost analysis
counts a loop's body once. Here a computation's executions are followed from the
entry down:

  while          body and condition run as often as the loop turns. XLA writes
                 `known_trip_count` where it knows it; else it is read from the
                 condition, `counter < constant`. A loop of which neither tells
                 counts once, and is named
  conditional    one branch, the larger one: an upper bound
  call, fusion   once per execution of the instruction
  *-start        once; `*-update` and `*-done` are the same operation
  sort, reduce, scatter, ... call theirs per element: these count as never run
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple


class Array(NamedTuple):
  """One array of a type, e.g. `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.

  Attributes:
    dtype: as XLA writes it.
    shape: shape of the array as one device holds it.
  """

  dtype: str
  shape: tuple[int, ...]


class Instruction(NamedTuple):
  """`%name = type opcode(operands), attributes`.

  Attributes:
    name: without `%`.
    type: an array's, or a tuple's in brackets.
    opcode: e.g. `fusion`.
    operands: names within the same computation; of a parameter or constant,
      what is written in its brackets.
    attributes: the rest of the line.
    root: whether it is the computation's result.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


class Program(NamedTuple):
  """A program's computations by name, each its instructions by name.

  Attributes:
    entry: the name of the first to run; empty if there is none.
    computations: in the order of the text.
  """

  entry: str
  computations: dict[str, dict[str, Instruction]]


class Executions(NamedTuple):
  """How often the computations run in one run of the program.

  Attributes:
    times: per computation; 0 for those of sorts and the like, and for the
      smaller branches of conditionals.
    fused: names of those that run inside a fusion, as part of one operation.
    unknown_loops: names of the `while`s whose turns nobody knows.
    conditionals: how many there are, of which the larger branch counts.
  """

  times: dict[str, int]
  fused: frozenset[str]
  unknown_loops: tuple[str, ...]
  conditionals: int


# --- parsing ---

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_FLAT = re.compile(r"\(([^()]*)\)")
_BITS = re.compile(r"\d+")


def parse(text: str) -> Program:
  """Reads `as_text()` of a compiled program, of any backend."""
  entry, name = "", None
  computations: dict[str, dict[str, Instruction]] = {}
  for line in text.splitlines():
    if line.startswith("}"):
      name = None
    elif name is not None:
      instruction = _parse_line(line)
      if instruction is not None:
        computations[name][instruction.name] = instruction
    elif head := _HEAD.match(line):
      name = head.group(2)
      computations[name] = {}
      entry = name if head.group(1) else entry
  return Program(entry, computations)


def arrays(type_: str) -> tuple[Array, ...]:
  """The arrays in a type, layouts left out."""
  return tuple(
    Array(
      dtype, tuple(int(n.strip(" <=")) for n in shape.split(",") if n.strip())
    )
    for dtype, shape in _ARRAY.findall(_COMMENT.sub("", type_))
  )


def elements(text: str) -> list[str]:
  """What the commas of a tuple type or operand list separate."""
  text = _COMMENT.sub("", text).strip()
  if text.startswith("(") and _closing(text, 0) == len(text):
    text = text[1:-1]
  parts, depth, start = [], 0, 0
  for i, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      parts.append(text[start:i])
      start = i + 1
  return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def operand_arrays(
  instruction: Instruction, computation: Mapping[str, Instruction]
) -> list[tuple[Array, ...]]:
  """The arrays of each operand of an instruction.

  Args:
    instruction: the instruction whose operands are looked up.
    computation: all instructions of its computation, by name.
  """
  return [
    arrays(computation[name].type) if name in computation else ()
    for name in instruction.operands
  ]


def result_arrays(instruction: Instruction) -> tuple[Array, ...]:
  """The arrays of a result; of the start of an operation, those of its end."""
  result, opcode = instruction.type, instruction.opcode
  if opcode.endswith("-start") and result.startswith("("):
    # (operands, results, semaphores); an all-reduce's is its results alone.
    if not opcode.startswith("all-reduce"):
      result = [*elements(result), "", ""][1]
  return arrays(result)


def size(array: Array) -> int:
  """Bytes of an array, without padding; none of a token."""
  count = math.prod(array.shape)
  bits = _BITS.search(array.dtype)
  width = 8 if array.dtype == "pred" else int(bits.group()) if bits else 0
  return -(-count * width // 8)


def _parse_line(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  root, name, rest = match.groups()
  end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
  opcode = _OPCODE.match(rest, end)
  if opcode is None:
    return None
  start = opcode.end() - 1
  flat = _FLAT.match(rest, start)
  stop = flat.end() if flat else _closing(rest, start)
  # Some versions write an operand's type, others the name alone.
  operands = tuple(
    part.rsplit(" ", 1)[-1].lstrip("%") for part in elements(rest[start:stop])
  )
  return Instruction(
    name, rest[:end], opcode.group(1), operands, rest[stop:], bool(root)
  )


def _closing(text: str, start: int) -> int:
  """One past the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in "([{") - (text[i] in ")]}")
    if depth == 0:
      return i + 1
  return len(text)


# --- executions ---

_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_CALLED_COMPUTATIONS = re.compile(r"\bcalled_computations=\{([^}]*)\}")
_BRANCHES = re.compile(
  r"\b(?:branch_computations=\{([^}]*)\}"
  r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_WHILE = re.compile(r"\b(condition|body)=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_DIRECTION = re.compile(r"\bdirection=(\w+)")


def executions(
  program: Program,
  cost: Callable[[str], tuple[int, int]],
  *,
  unknown_turns: int = 1,
) -> Executions:
  """How often each computation runs.

  Args:
    program: from `parse`.
    cost: FLOPs and bytes of the computation of this name, with nothing that it
      calls; of two branches the one with more, calls included, counts.
    unknown_turns: how often a loop turns where the text does not tell.
  """
  called: dict[str, list[tuple[str, int, bool]]] = {}
  totals: dict[str, tuple[int, int]] = {}
  unknown: list[str] = []
  fused: set[str] = set()
  conditionals = 0

  def visit(name: str) -> tuple[int, int]:
    """Its cost with what it calls; fills `called` on the way."""
    nonlocal conditionals
    if name in totals:
      return totals[name]
    calls, total = [], cost(name)
    for instruction in program.computations.get(name, {}).values():
      if instruction.opcode == "while":
        parts = dict(_WHILE.findall(instruction.attributes))
        turns = trip_count(instruction, name, program)
        if turns is None:
          unknown.append(instruction.name)
        turns = unknown_turns if turns is None else turns
        calls += [(part, turns, False) for part in parts.values()]
      elif instruction.opcode == "conditional":
        conditionals += 1
        largest = max(_branches(instruction), key=visit)
        calls.append((largest, 1, False))
      else:
        inside = instruction.opcode == "fusion"
        calls += [(part, 1, inside) for part in _parts(instruction)]
    for part, turns, _ in calls:
      flops, moved = visit(part)
      total = total[0] + turns * flops, total[1] + turns * moved
    called[name], totals[name] = calls, total
    return total

  times = dict.fromkeys(program.computations, 0)
  if program.entry:
    visit(program.entry)
    times[program.entry] = 1
  # `called` has each computation after all that it calls: callers first.
  for name in reversed(called):
    for part, turns, inside in called[name]:
      times[part] = times.get(part, 0) + turns * times[name]
      if inside or name in fused:
        fused.add(part)
  return Executions(times, frozenset(fused), tuple(unknown), conditionals)


def trip_count(loop: Instruction, where: str, program: Program) -> int | None:
  """Turns of a `while`; None if the text does not tell.

  Args:
    loop: the instruction.
    where: name of its computation.
    program: the whole.
  """
  known = _TRIP_COUNT.search(loop.attributes)
  if known:
    return int(known.group(1))
  parts = dict(_WHILE.findall(loop.attributes))
  condition = program.computations.get(parts["condition"], {})
  body = program.computations.get(parts["body"], {})
  compare = next((i for i in condition.values() if i.root), None)
  if compare is None or compare.opcode != "compare":
    return None
  direction = _DIRECTION.search(compare.attributes)
  if direction is None or direction.group(1) not in ("LT", "LE", "NE"):
    return None
  index = _element(compare.operands[0], condition)
  if index is None:
    return None
  start = _initial(index, loop, program.computations[where])
  end = _constant(compare.operands[1], condition)
  if end is None:
    # A limit that the loop carries along with its counter.
    limit = _element(compare.operands[1], condition)
    if limit is not None and _step(limit, body) == 0:
      end = _initial(limit, loop, program.computations[where])
  step = _step(index, body)
  if start is None or end is None or not step or step < 0:
    return None
  end += direction.group(1) == "LE"
  return max(0, -((start - end) // step))


def _parts(instruction: Instruction) -> Iterator[str]:
  """Computations that the instruction runs once each."""
  opcode = instruction.opcode
  if opcode in ("fusion", "call") or opcode.endswith("-start"):
    if opcode != "all-reduce-start" and opcode != "reduce-scatter-start":
      yield from _CALLED.findall(instruction.attributes)
  elif opcode == "custom-call":
    for names in _CALLED_COMPUTATIONS.findall(instruction.attributes):
      yield from re.findall(r"[\w.\-]+", names)


def _branches(instruction: Instruction) -> list[str]:
  names = _BRANCHES.search(instruction.attributes)
  return re.findall(r"[\w.\-]+", " ".join(filter(None, names.groups())))


def _followed(
  name: str, computation: Mapping[str, Instruction]
) -> Instruction | None:
  """What a name stands for behind copies."""
  instruction = computation.get(name)
  while instruction is not None and instruction.opcode in ("copy", "bitcast"):
    instruction = computation.get(instruction.operands[0])
  return instruction


def _constant(name: str, computation: Mapping[str, Instruction]) -> int | None:
  found = _followed(name, computation)
  if found is None or found.opcode != "constant":
    return None
  text = found.operands[0] if found.operands else ""
  return int(text) if re.fullmatch(r"-?\d+", text) else None


def _element(name: str, computation: Mapping[str, Instruction]) -> int | None:
  """Which element of the loop's state a name is."""
  found = _followed(name, computation)
  if found is None or found.opcode != "get-tuple-element":
    return None
  return int(re.search(r"\bindex=(\d+)", found.attributes).group(1))


def _initial(
  index: int, loop: Instruction, computation: Mapping[str, Instruction]
) -> int | None:
  """The constant with which an element of the loop's state begins."""
  state = _followed(loop.operands[0], computation)
  if state is None or state.opcode != "tuple":
    return None
  return _constant(state.operands[index], computation)


def _step(index: int, body: Mapping[str, Instruction]) -> int | None:
  """What one turn adds to an element of the loop's state."""
  result = next((i for i in body.values() if i.root), None)
  if result is None or result.opcode != "tuple":
    return None
  name = result.operands[index]
  if _element(name, body) == index:
    return 0
  added = _followed(name, body)
  if added is None or added.opcode != "add":
    return None
  for one, other in (added.operands, added.operands[::-1]):
    if _element(one, body) == index:
      return _constant(other, body)
  return None
