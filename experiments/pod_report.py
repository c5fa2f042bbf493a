"""`compile_for_pod`'s result for the terminal: a table, then a verdict each."""

from collections.abc import Iterable, Mapping
from typing import Any

from engram_jax.analysis.compiled import COLLECTIVES
from experiments.benchmarks.harness import GIB, MIB, aligned

#: Operations named below the table.
SHOWN = 6


def tables(result: Mapping[str, Any]) -> list[str]:
  """The result for the terminal."""
  programs = result["programs"]
  rows: list[list[Any]] = []

  def add(name, *keys, unit=1):
    values = []
    for program in programs.values():
      for key in keys:
        program = program and program.get(key)
      values.append(program)
    if any(values):
      rows.append([name, *(v if v is None else v / unit for v in values)])

  unit, name = (GIB, "GiB") if result["hbm_gib"] else (MIB, "MiB")
  add("sequences", "sequences")
  add("tokens", "tokens")
  add("microbatches", "accumulation")
  add("parameters of all, millions", "parameters", "total", unit=1e6)
  add("  of them in tables", "parameters", "tables", unit=1e6)
  for part in ("params", "opt_state", "tables", "table_states"):
    add(f"state: {part}, {name}", "state_bytes", part, unit=unit)
  for part in ("argument", "temp", "peak", "total"):
    add(f"memory: {part}, {name}", "memory", part, unit=unit)
  for kind in COLLECTIVES:
    add(f"{kind}, {name}", "collectives", "bytes", kind, unit=unit)
    add("  operations in the program", "collectives", "operations", kind)
  add("TFLOP of products", "cost", "flops", unit=1e12)
  add("memory traffic, GiB", "cost", "bytes_accessed", unit=GIB)
  add("estimate at peak rates, ms", "cost", "optimal_seconds", unit=1e-3)
  add("the compiler's cycles, ms", "cost", "compiler_seconds", unit=1e-3)
  add("  not in them, at peak, ms", "cost", "unpriced_seconds", unit=1e-3)
  for step in ("trace", "lower", "compile"):
    add(f"to {step}, s", f"{step}_seconds")
  add("instructions", "instructions")
  head = f"{result['topology']}: {result['devices']} devices"
  texts = [head, aligned(["per device", *programs], rows)]
  for name, program in programs.items():
    texts.append("\n".join(_verdict(name, program, result["hbm_gib"])))
  names = " over ".join(programs)
  for key, what in (
    ("optimal_seconds", "estimate at peak rates"),
    ("compiler_seconds", "the compiler's cycles"),
  ):
    ratio = result.get(f"{key}_ratio")
    if ratio:
      texts.append(f"{what}, {names}: {ratio:.3f}")
  return texts


def _verdict(
  name: str, program: Mapping[str, Any], hbm: int | None
) -> Iterable[str]:
  """Whether it fits and what fills it; what runs longest and is sent most."""
  mesh = ", ".join(f"{axis} {n}" for axis, n in program["mesh"].items())
  if not program["fits"]:
    yield f"{name}: DOES NOT FIT in {hbm} GiB; {_cause(program)}"
    yield f"  mesh {mesh}"
    yield f"  the compiler: {program['refusal']}"
    return
  # XLA's peak for CPUs has no temporaries in it.
  takes = _size(program["memory"]["peak" if hbm else "total"])
  takes += f" of {hbm} GiB: fits" if hbm else ""
  yield f"{name}: {takes}; {_cause(program)}"
  yield f"  mesh {mesh}"
  sent, cost = program["collectives"], program["cost"]
  for record in sent["largest"][:1]:
    shape = ",".join(map(str, record["shape"]))
    array = f"{record['dtype']}[{shape}]"
    yield (
      f"  largest collective: {record['kind']} of {_size(record['bytes'])}, "
      f"{array if record['arrays'] == 1 else f'largest part {array}'}, "
      f"{record['times']} times"
    )
  if sent["in_loops"]:
    yield (
      f"  {sent['in_loops']} collectives are in loops; all together run "
      f"{sent['executions']} times"
    )
  if cost["unknown_loops"]:
    yield (
      f"  {cost['unknown_loops']} loops end where the data say: they count "
      f"{program['unknown_turns']} times, attention's mean over its blocks"
    )
  if cost["conditionals"]:
    yield (
      f"  {cost['conditionals']} conditionals counted by their larger branch: "
      "an upper bound"
    )
  if program["parameters"]["tables"]:
    moved = (sent["of_tables"], program["copies_of_tables"])
    counts = [sum(record["count"] for record in records) for records in moved]
    yield (
      f"  tables or parts of them: {counts[0]} sent between devices, "
      f"{counts[1]} copied within one"
    )
  for one in (program["top_operations"] or ())[:SHOWN]:
    yield (
      f"  {1e3 * one['seconds']:.2f} ms at peak, {_cycles(one)}, "
      f"{one['times']} times {one['opcode']} {one['op_name'] or one['name']}"
    )


def _cycles(operation: Mapping[str, Any]) -> str:
  seconds = operation["compiler_seconds"]
  return "no cycles" if seconds is None else f"{1e3 * seconds:.2f} ms in cycles"


def _cause(program: Mapping[str, Any]) -> str:
  """The largest array of the state, and the largest temporaries if known."""
  largest, size = next(iter(program["largest_arrays"].items()))
  held = sum(program["state_bytes"].values())
  cause = f"largest array {largest}, {_size(size)} of {_size(held)} of state"
  buffers = program.get("largest_temporaries")
  if not buffers:
    return cause
  listed = ", ".join(f"{_size(b['bytes'])} {b['shapes']}" for b in buffers)
  return f"{cause}; largest temporaries {listed}"


def _size(count: int) -> str:
  return (
    f"{count / GIB:.2f} GiB" if count > GIB / 10 else f"{count / MIB:.1f} MiB"
  )
