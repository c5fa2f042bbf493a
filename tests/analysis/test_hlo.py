"""How often each computation of a program runs, on texts and real programs."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from engram_jax.analysis import hlo

STATE = "(s32[], s32[], f32[8])"
BODY = (
  "%body (p: ({state})) -> ({state}) {{",
  "  %p = {state} parameter(0)",
  "  %one = s32[]{{:T(128)}} constant({step})",
  "  %i = s32[] get-tuple-element(%p), index=0",
  "  %copy = s32[]{{:T(128)S(6)}} copy(%i)",
  "  %n = s32[] get-tuple-element(%p), index=1",
  "  %next = s32[] {update}(%copy, %one)",
  "  %x = f32[8] get-tuple-element(%p), index=2",
  "  %y = f32[8] fusion(%x), kind=kLoop, calls=%inside",
  "  ROOT %t = {state} tuple(%next, %n, %y)",
  "}}",
)
CONDITION = (
  "%condition (p: ({state})) -> pred[] {{",
  "  %p = {state} parameter(0)",
  "  %end = s32[] constant(7)",
  "  %i = s32[] get-tuple-element(%p), index=0",
  "  %n = s32[] get-tuple-element(%p), index=1",
  "  ROOT %lt = pred[] compare(%i, %{end}), direction={direction}",
  "}}",
)
INSIDE = (
  "%inside (p: f32[8]) -> f32[8] {{",
  "  %p = f32[8] parameter(0)",
  "  ROOT %e = f32[8] exponential(%p)",
  "}}",
)
ENTRY = (
  "ENTRY %main (x: f32[8]) -> f32[8] {{",
  "  %x = f32[8] parameter(0)",
  "  %start = s32[] constant({start})",
  "  %limit = s32[] {limit}",
  "  %state = {state} tuple(%start, %limit, %x)",
  "  %loop = {state} while(%state), condition=%condition, body=%body{known}",
  "  ROOT %r = f32[8] get-tuple-element(%loop), index=2",
  "}}",
)


def loop(**changes):
  """A program of one loop, as XLA:TPU writes it."""
  fields = dict(
    state=STATE,
    start=0,
    step=1,
    update="add",
    end="end",
    limit="constant(9)",
    direction="LT",
    known="",
  )
  lines = "\n".join((*INSIDE, *BODY, *CONDITION, *ENTRY))
  return lines.format(**fields | changes)


def times(text):
  return hlo.executions(hlo.parse(text), lambda name: (0, 0))


KNOWN = ', backend_config={"known_trip_count":{"n":"4"},"x":1}'


@pytest.mark.parametrize(
  "changes, turns",
  [
    ({}, 7),
    ({"known": KNOWN}, 4),
    ({"start": 3}, 4),
    ({"start": 9}, 0),
    ({"step": 2}, 4),
    ({"direction": "NE"}, 7),
    ({"direction": "LE"}, 8),
    ({"end": "n"}, 9),  # a limit that the loop carries along
    ({"end": "n", "limit": "parameter(1)"}, None),
    ({"end": "x"}, None),
    ({"step": 0}, None),
    ({"update": "multiply"}, None),
    ({"direction": "GT"}, None),
  ],
)
def test_turns_of_a_loop(changes, turns):
  found = times(loop(**changes))
  assert found.unknown_loops == (("loop",) if turns is None else ())
  turns = 1 if turns is None else turns
  expected = {"main": 1, "body": turns, "condition": turns, "inside": turns}
  assert found.times == expected


def test_an_instruction():
  text = (
    "ENTRY %main (x: f32[]) -> f32[] {\n"
    "  ROOT %a.1 = (f32[8,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}) "
    "custom-call(f32[8]{0} %x, /*index=1*/(s32[], f32[<=9]) %y.2), "
    'custom_call_target="f(x)"\n}\n'
  )
  (found,) = hlo.parse(text).computations["main"].values()
  assert (found.name, found.opcode, found.root) == ("a.1", "custom-call", True)
  assert found.operands == ("x", "y.2")
  assert found.attributes == ', custom_call_target="f(x)"'
  assert hlo.arrays(found.type) == (("f32", (8, 4)), ("u32", ()))


def executed(f, *arguments):
  """The largest number of times that any computation of `f` runs."""
  text = jax.jit(f).lower(*arguments).compile().as_text()
  found = times(text)
  return max(found.times.values()), found


X = jnp.ones((4, 4))


def test_real_loops():
  def nested(x):
    def outer(x, _):
      return lax.fori_loop(2, 7, lambda i, x: jnp.sin(x) * i, x), None

    return lax.scan(outer, x, length=11)[0]

  most, found = executed(nested, X)
  assert most == 55
  assert found.unknown_loops == ()


def test_a_loop_until_something_happens_is_named():
  most, found = executed(
    lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x), X
  )
  assert most == 1
  (name,) = found.unknown_loops
  assert re.fullmatch(r"while[\w.\-]*", name)


def test_of_two_branches_the_larger_counts():
  text = (
    "%small (p: f32[8]) -> f32[8] {\n"
    "  ROOT %p.1 = f32[8] parameter(0)\n}\n"
    "%large (p: f32[8]) -> f32[8] {\n"
    "  %p.2 = f32[8] parameter(0)\n"
    "  ROOT %c = f32[8] call(%p.2), to_apply=%work\n}\n"
    "%work (p: f32[8]) -> f32[8] {\n"
    "  ROOT %p.3 = f32[8] parameter(0)\n}\n"
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    "  %x = f32[8] parameter(0)\n"
    "  ROOT %r = f32[8] conditional(%b, %x, %x), BRANCHES\n}\n"
  )
  cost = {"work": (5, 0), "small": (0, 9)}
  for branches in (
    "branch_computations={%small, %large}",
    "true_computation=%large, false_computation=%small",
  ):
    program = hlo.parse(text.replace("BRANCHES", branches))
    found = hlo.executions(program, lambda name: cost.get(name, (0, 0)))
    assert found.times == {"main": 1, "large": 1, "work": 1, "small": 0}
    assert found.conditionals == 1


def test_a_sort_runs_its_comparison_as_nothing_of_its_own():
  _, found = executed(lambda x: jnp.sort(x, axis=0), X)
  assert 0 in found.times.values()
