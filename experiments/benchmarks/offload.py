"""Generation with the rows elsewhere: what it costs, and what prefetch hides.

  python -m experiments.benchmarks.offload
  python -m experiments.benchmarks.offload --preset=tiny --row_format=int8

One model and the same prompts, with the same tokens as the outcome:

  resident          tables on the device, hashed and read by the program
  host              packed rows in host memory, read before each step
  host, prefetch    the same on a thread: a prompt's rows while the prompts
                    before are computed; a new token's, while the blocks below
                    the first Engram layer are
  pinned            packed rows in pinned host memory, gathered there by a
                    program, where the platform does that
  pinned, prefetch
  file              a row file, all of it in the page cache
  file, prefetch

They take turns, token by token when decoding. A table's values are those that
the packed rows stand for, so that all must draw the same tokens: the program
ends with an error if not.

Then a host store made slower (`SlowStore`), with and without prefetch: up to
which latency the prefetch hides it. In decoding no more than the blocks below
the first Engram layer can be hidden behind, for the token to come decides what
is read (with --layers the memory is elsewhere).

With --gib the memory is as large as that; with --packed the resident one is
packed too. On a machine without an accelerator the thread and the model share
the cores.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.decoding.decoders import Decoded, Decoder
from engram_jax.decoding.generate import pad_prompts
from engram_jax.decoding.weights import DecodingModel
from engram_jax.errors import InputError, require
from engram_jax.memory.memory import Memory
from engram_jax.stores.host_stores import FileStore, HostStore
from engram_jax.stores.program_stores import (
  DeviceStore,
  PinnedStore,
  TableStore,
)
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.store import RowStore
from experiments.benchmarks import harness
from experiments.benchmarks.fixtures import (
  SlowStore,
  make_row_file,
  make_rows,
  to_tables,
  with_memory_of,
)
from experiments.benchmarks.models import preset_with_memory, random_model

#: What the name of a case ends with whose rows a thread reads.
PREFETCH = ", prefetch"
PHASES = ("prefill", "decode")
#: Share of the resident throughput that is to be reached with prefetch.
TARGETS = {"host": 0.97, "file": 0.95}
FLAGS = {
  "preset": ("small", "Of engram_jax/presets.py."),
  "layers": ([], "Where the memory is instead of the preset's layers."),
  "row_format": ("fp8", "Of the packed rows."),
  "gib": (0.0, "Of packed rows; 0 for as many rows as the preset has."),
  "packed": (False, "Resident rows are packed ones, not float32 tables."),
  "prompts": (32, "Number of prompts; a multiple of --batch."),
  "shortest": (13, "Tokens of a prompt; lengths are uniform."),
  "longest": (128, "Tokens of a prompt, at most."),
  "batch": (8, "Prompts at a time."),
  "new_tokens": (32, "After the last batch of prompts."),
  "repeats": (5, "Timed turns."),
  "delays_ms": ([2.0, 5.0, 10.0, 20.0, 50.0], "Of the store made slower."),
}


class Subject(NamedTuple):
  """A model with random weights, and what it is asked.

  Attributes:
    model: as decoding takes it.
    memory: hash of raw token ids, without a tokenizer.
    batches: prompts, padded: int32 [B, L] and [B].
    new_tokens: tokens decoded after the last batch.
  """

  model: DecodingModel
  memory: Memory
  batches: list[tuple[jax.Array, jax.Array]]
  new_tokens: int


def make_subject(
  config: ModelConfig,
  *,
  prompts: int,
  shortest: int,
  longest: int,
  batch: int,
  new_tokens: int,
) -> Subject:
  """A model drawn at random, and prompts of Zipf-distributed tokens.

  Args:
    config: a model with a memory; the others as the flags.
  """
  ok = prompts % batch == 0
  require(ok, "prompts", prompts, f"a multiple of the batch, {batch}")
  ok = new_tokens >= 2
  require(ok, "new_tokens", new_tokens, "2 or more: the first is not timed")
  ok = 1 <= shortest <= longest
  require(ok, "shortest", shortest, f"1 to {longest}, the longest")
  rng, size = harness.rng(1), config.vocab_size
  chances = 1 / np.arange(1, size + 1)
  lengths = rng.integers(shortest, longest, prompts, endpoint=True)
  texts = [
    rng.choice(size, n, p=chances / chances.sum()).tolist() for n in lengths
  ]
  memory = Memory.create(config.engram, vocab_size=size)
  batches = [
    pad_prompts(texts[i : i + batch], vocab_size=size)
    for i in range(0, prompts, batch)
  ]
  return Subject(random_model(config), memory, batches, new_tokens)


# --- runs ---


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prefill(subject: Subject, decoder: Decoder) -> Decoded:
  """Reads all prompts, batch after batch; what the last one leaves."""
  ends, longest = [], max(tokens.shape[1] for tokens, _ in subject.batches)
  for tokens, lengths in subject.batches:
    state = decoder.init_state(len(lengths), longest + subject.new_tokens)
    ends.append(decoder.start(state, tokens, lengths))
    # One ahead: its rows are fetched while this one is computed.
    if len(ends) > 1:
      jax.block_until_ready(ends.pop(0)())
  return jax.block_until_ready(ends.pop()())


def decode(decoder: Decoder, decoded: Decoded) -> tuple[Decoded, jax.Array]:
  """One more token for each sequence, the likeliest; and which these are."""
  logits, state = decoded
  new = _likeliest(logits)
  return jax.block_until_ready(decoder.start(state, new)()), new


def in_turns(
  subject: Subject, decoders: Mapping[str, Decoder], *, repeats: int
) -> dict[str, dict[str, float]]:
  """Runs decoders in turns: all prompts, then token by token.

  A turn of the first kind is all prompts; of the second, one token, so that
  what disturbs the machine for a while hits all decoders. One round of both is
  not measured.

  Returns:
    Per decoder, of the medians: `prefill`, `decode`, tokens/s; and these over
    the first decoder's, `prefill_ratio`, `decode_ratio`.

  Raises:
    RuntimeError: they do not draw the same tokens.
  """
  first = next(iter(decoders))
  taken = {(name, phase): [] for name in decoders for phase in PHASES}
  for turn in range(repeats + 1):
    states, tokens = {}, {}
    for name, decoder in decoders.items():
      start = time.perf_counter()
      states[name] = prefill(subject, decoder)
      taken[name, "prefill"] += [time.perf_counter() - start] * bool(turn)
    for step in range(subject.new_tokens):
      for name, decoder in decoders.items():
        start = time.perf_counter()
        states[name], tokens[name] = decode(decoder, states[name])
        spent = time.perf_counter() - start
        taken[name, "decode"] += [spent] * bool(turn and step)
      for name, new in tokens.items():
        if not np.array_equal(new, tokens[first]):
          raise RuntimeError(f"{name}: other tokens than {first}")
    print(f"turn {turn} of {repeats} is done", file=sys.stderr, flush=True)
  lengths = [lengths for _, lengths in subject.batches]
  counts = int(sum(map(np.sum, lengths))), len(lengths[-1])
  found = {}
  for name in decoders:
    case = found[name] = {}
    for phase, count in zip(PHASES, counts):
      case[phase] = count / statistics.median(taken[name, phase])
      case[f"{phase}_ratio"] = case[phase] / found[first][phase]
  return found


def compare(
  subject: Subject,
  row_format: RowFormat,
  folder: pathlib.Path,
  *,
  repeats: int,
  delays_ms: Sequence[float],
  packed: bool = False,
) -> harness.Figures:
  """All stores in turns, and the curve over a store's latency.

  Returns:
    `cases` by name, from `in_turns`; `left_out`, stores that the platform does
    not have, and why; `latency`, a point per delay: the ratio of each phase
    `without` and `with` prefetch; `targets`.
  """
  rows = make_rows(subject.memory.num_rows, row_format)
  host = HostStore(rows, row_format)
  file = make_row_file(folder / "rows", subject.memory.hashing, row_format)
  stores: dict[str, RowStore] = {"host": host, "file": FileStore(file)}
  left_out = {}
  try:
    stores["pinned"] = PinnedStore(rows, row_format)
  except InputError as error:
    left_out["pinned"] = str(error)
  slow = {d: SlowStore(host, delay_s=d / 1e3) for d in delays_ms}
  if packed:
    resident = DeviceStore(rows, row_format)
  else:
    resident = TableStore(to_tables(rows, row_format))
  decoders = {"resident": Decoder(subject.model, subject.memory, resident)}
  with contextlib.ExitStack() as threads:
    for name, store in (stores | slow).items():
      for prefetch in (False, True):
        decoder = Decoder(
          subject.model, subject.memory, store, prefetch=prefetch
        )
        label = f"{name}{PREFETCH}" if prefetch else f"{name}"
        decoders[label] = threads.enter_context(decoder)
    cases = in_turns(subject, decoders, repeats=repeats)
  latency = []
  for delay in slow:
    both = {
      "without": cases.pop(f"{delay}"),
      "with": cases.pop(f"{delay}{PREFETCH}"),
    }
    ratios = {
      phase: {how: case[f"{phase}_ratio"] for how, case in both.items()}
      for phase in PHASES
    }
    latency.append({"delay_ms": delay, **ratios})
  targets = {
    f"{name}, {phase}": harness.target(
      cases[name + PREFETCH][f"{phase}_ratio"], at_least=least
    )
    for name, least in TARGETS.items()
    for phase in PHASES
  }
  return {
    "cases": cases,
    "left_out": left_out,
    "latency": latency,
    "targets": targets,
  }


# --- the benchmark ---


def measure(
  *,
  preset: str,
  layers: Sequence[int],
  row_format: str,
  gib: float,
  packed: bool,
  repeats: int,
  delays_ms: Sequence[float],
  **prompts: int,
) -> harness.Figures:
  """The preset's model, its memory where the flags say; `compare`."""
  require(delays_ms, "delays_ms", "none", "one or more latencies")
  config = preset_with_memory(preset).model
  if layers:
    memory = dataclasses.replace(config.engram, layers=tuple(layers))
    config = dataclasses.replace(config, engram=memory)
  rows = RowFormat(row_format, config.engram.head_dim)
  if gib:
    config = with_memory_of(config, gib, rows)
  subject = make_subject(config, **prompts)
  options = dict(repeats=repeats, delays_ms=delays_ms, packed=packed)
  with tempfile.TemporaryDirectory() as folder:
    return compare(subject, rows, pathlib.Path(folder), **options)


def tables(result: harness.Figures) -> list[str]:
  cases = [{"name": name, **case} for name, case in result["cases"].items()]
  columns, curve = {"rows in": "name"}, {"latency, ms": "delay_ms"}
  for phase in PHASES:
    columns[f"{phase} tokens/s"] = phase
    columns[f"{phase} of resident"] = f"{phase}_ratio"
    curve[f"{phase} without"] = f"{phase}.without"
    curve[f"{phase} with prefetch"] = f"{phase}.with"
  title = "a slower store, of resident"
  return [
    harness.table(columns, cases),
    harness.table(curve, result["latency"], title=title),
    *(f"without {name}: {why}" for name, why in result["left_out"].items()),
  ]


PICTURE = harness.Picture(
  "latency",
  x="delay_ms",
  lines={
    f"{phase}, {text}": f"{phase}.{how}"
    for phase in PHASES
    for how, text in (("with", "prefetch"), ("without", "no prefetch"))
  },
  title="Rows from a slow store",
  xlabel="latency of the store (ms)",
  ylabel="throughput (% of resident)",
)
BENCHMARK = harness.Benchmark(measure, tables, FLAGS, picture=PICTURE)

if __name__ == "__main__":
  harness.run(BENCHMARK)
