"""Generation with the rows elsewhere: what it costs, and what prefetch hides.

  python -m experiments.benchmarks.offload
  python -m experiments.benchmarks.offload --quick

One model and the same prompts, with the same tokens as the outcome:

  resident          tables on the device, hashed and read by the program
  host              packed rows in host memory, read before each step
  host, prefetch    the same on a thread: a prompt's rows while the prompts
                    before are computed; a new token's, while the blocks below
                    the first Engram layer are
  file              a row file, all of it in the page cache
  file, prefetch

They take turns. A table's values are those that the packed rows stand for, so
that all must draw the same tokens: the program ends with an error if not.

Then a host store made slower (`SlowStore`), with and without prefetch: up to
which latency the prefetch hides it. `fetch_ms` is one fetch alone, `below_ms`
the blocks below the first Engram layer alone: in decoding no more than that can
be hidden, for the token to come decides what is read. `hidden` is

  1 - (time of a step - time of a resident step) / fetch_ms

On a machine without an accelerator the thread and the model share the cores.
"""

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from engram_jax.analysis.accounting import counting_hash
from engram_jax.analysis.plots import plot_lines
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.decoding.decoders import Decoder, StoreDecoder, TableDecoder
from engram_jax.decoding.generate import pad_prompts
from engram_jax.decoding.state import begin, init_state
from engram_jax.decoding.weights import for_decoding
from engram_jax.errors import require
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.prefetch import (
  Prefetcher,
  read_to_device,
  row_ids_on_host,
)
from engram_jax.memory.quantization import RowFormat, pack_rows, unpack_rows
from engram_jax.memory.row_file_headers import Header
from engram_jax.memory.row_files import RowFile, write_row_file
from engram_jax.memory.stores import (
  FileStore,
  HostStore,
  ReadStatistics,
  RowStore,
  SlowStore,
)
from engram_jax.presets import preset as find_preset
from experiments.benchmarks import harness

HERE = "experiments.benchmarks.offload"
#: Share of the resident throughput that is to be reached with prefetch.
TARGETS = {"host": 0.97, "file": 0.95}
#: What the flags are with --quick, where they are not given.
QUICK = {
  "preset": "tiny",
  "row_format": "int8",
  "prompts": 4,
  "longest": 40,
  "shortest": 10,
  "batch": 2,
  "new_tokens": 4,
  "repeats": 1,
  "delays_ms": ["0", "20"],
}


# --- what is measured ---


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A model with random weights, and what it is asked.

  Attributes:
    model: as decoding takes it.
    hashing: of raw token ids.
    compression: the identity.
    batches: of prompts, padded: int32 [B, L] and [B].
    new_tokens: decoded after the last batch.
  """

  model: Transformer
  hashing: NgramHash
  compression: TokenCompression
  batches: list[tuple[jax.Array, jax.Array]]
  new_tokens: int

  @property
  def capacity(self) -> int:
    longest = max(tokens.shape[1] for tokens, _ in self.batches)
    return longest + self.new_tokens

  @property
  def prompt_tokens(self) -> int:
    return sum(int(lengths.sum()) for _, lengths in self.batches)


def make_subject(
  config: ModelConfig,
  *,
  prompts: int,
  shortest: int,
  longest: int,
  batch: int,
  new_tokens: int,
  seed: int = 0,
) -> Subject:
  """A model drawn at random, and prompts of Zipf-distributed tokens.

  Args:
    config: with a memory.
    prompts: how many, a multiple of `batch`.
    shortest: tokens of a prompt, lengths being uniform.
    longest: at most.
    batch: prompts at a time.
    new_tokens: see `Subject`.
    seed: of everything.
  """
  ok = prompts % batch == 0
  require(ok, "prompts", prompts, f"a multiple of the batch, {batch}")
  ok = 1 <= shortest <= longest
  require(ok, "shortest", shortest, f"1 to {longest}, the longest")
  graph, shapes = jax.eval_shape(
    lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)))
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    # By NumPy: to compile the drawing of every array takes longer.
    if "scale" in str(path):
      return jnp.ones(leaf.shape, leaf.dtype)
    values = rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(config.init_std * values, leaf.dtype)

  model = nnx.merge(graph, jax.tree.map_with_path(draw, shapes))
  size = config.vocab_size
  chances = 1 / np.arange(1, size + 1)
  chances /= chances.sum()
  lengths = rng.integers(shortest, longest, prompts, endpoint=True)
  texts = [rng.choice(size, n, p=chances).tolist() for n in lengths]
  return Subject(
    for_decoding(model),
    counting_hash(config),
    TokenCompression.identity(size),
    [
      pad_prompts(texts[i : i + batch], vocab_size=size)
      for i in range(0, prompts, batch)
    ],
    new_tokens,
  )


def make_rows(
  num_rows: Mapping[int, int], row_format: RowFormat, *, seed: int = 0
) -> dict[int, np.ndarray]:
  """Random packed rows, uint8 [R, n] per layer."""
  pack = jax.jit(pack_rows, static_argnums=1)
  packed = {}
  for layer, rows in num_rows.items():
    key = jax.random.fold_in(jax.random.key(seed), layer)
    values = 0.02 * jax.random.normal(key, (rows, row_format.width))
    packed[layer] = np.array(pack(values, row_format))
  return packed


def write_rows(
  path: pathlib.Path,
  packed: Mapping[int, np.ndarray],
  hashing: NgramHash,
  row_format: RowFormat,
) -> RowFile:
  """A row file of these rows, opened."""
  header = Header(row_format, hashing.num_rows, hashing)
  write_row_file(path, {i: [rows] for i, rows in packed.items()}, header)
  return RowFile(path, hashing=hashing)


@contextlib.contextmanager
def decoder_of(
  subject: Subject, store: RowStore, *, prefetch: bool
) -> Iterator[Decoder]:
  """A decoder that reads a store, and the thread that it may need."""
  parts = subject.hashing, subject.compression
  with contextlib.ExitStack() as threads:
    rows = store
    if prefetch:
      rows = threads.enter_context(Prefetcher(store, subject.hashing))
    yield StoreDecoder(subject.model, rows, *parts)


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def run(subject: Subject, decoder: Decoder) -> dict[str, Any]:
  """All prompts, then new tokens after the last batch of them.

  Returns:
    `prefill_s`, `decode_s`, and `tokens`, int32 [B, new tokens].
  """
  start = time.perf_counter()
  ends = []
  for tokens, lengths in subject.batches:
    state = decoder.init_state(len(lengths), subject.capacity)
    ends.append(decoder.start(state, tokens, lengths))
    # One ahead: its rows are fetched while this one is computed.
    if len(ends) > 1:
      jax.block_until_ready(ends.pop(0)())
  logits, state = jax.block_until_ready(ends.pop()())
  prefill_s = time.perf_counter() - start
  start, found = time.perf_counter(), []
  for _ in range(subject.new_tokens):
    new = _likeliest(logits)
    logits, state = decoder.start(state, new)()
    found.append(new)
  jax.block_until_ready(logits)
  decode_s = time.perf_counter() - start
  return {
    "prefill_s": prefill_s,
    "decode_s": decode_s,
    "tokens": np.stack(found, axis=1),
  }


def in_turns(
  subject: Subject, decoders: Mapping[str, Decoder], *, repeats: int
) -> dict[str, dict[str, float]]:
  """Runs decoders in turns, once unmeasured before.

  Returns:
    Per decoder the medians: `prefill`, `decode`, tokens/s; `prefill_ms`,
    milliseconds per batch; `decode_ms`, per step.

  Raises:
    RuntimeError: they do not draw the same tokens.
  """
  expected = None
  taken = {name: [] for name in decoders}
  for turn in range(repeats + 1):
    for name, decoder in decoders.items():
      result = run(subject, decoder)
      seconds = f"{result['prefill_s']:.1f} s, {result['decode_s']:.1f} s"
      print(f"{turn}: {name}: {seconds}", file=sys.stderr, flush=True)
      tokens = result.pop("tokens")
      expected = tokens if expected is None else expected
      if not np.array_equal(tokens, expected):
        raise RuntimeError(f"{name}: other tokens than {next(iter(decoders))}")
      taken[name].append(result)
  found = {}
  for name, results in taken.items():
    prefill, decode = (
      statistics.median(x[key] for x in results[1:])
      for key in ("prefill_s", "decode_s")
    )
    batch = len(subject.batches[-1][1])
    found[name] = {
      "prefill": subject.prompt_tokens / prefill,
      "decode": batch * subject.new_tokens / decode,
      "prefill_ms": 1e3 * prefill / len(subject.batches),
      "decode_ms": 1e3 * decode / subject.new_tokens,
    }
  return found


def pieces(
  subject: Subject, stores: Mapping[str, RowStore], *, repeats: int
) -> dict[str, dict[str, float]]:
  """Fetches, and the blocks below the memory, each alone, in milliseconds.

  Returns:
    For `prefill` (the last batch) and `decode` (one token each): `below_ms`,
    and `fetch_ms` per store.
  """
  hashing = subject.hashing
  prompt = subject.batches[-1][0]
  below = jax.jit(begin)
  found = {}
  for phase, tokens in {"prefill": prompt, "decode": prompt[:, :1]}.items():
    state = init_state(
      subject.model, hashing, batch=len(tokens), capacity=subject.capacity
    )
    canonical = np.asarray(tokens)
    history = np.asarray(state.history)

    def fetch(store, canonical=canonical, history=history):
      ids = row_ids_on_host(hashing, canonical, history=history)
      return read_to_device(store, ids)

    cases = {
      name: functools.partial(fetch, store) for name, store in stores.items()
    }
    cases["below"] = functools.partial(
      below, subject.model, state.cache, tokens
    )
    times = harness.interleaved(cases, repeats=max(5, 3 * repeats))
    alone = {name: x["median_ms"] for name, x in times.items()}
    found[phase] = {"below_ms": alone.pop("below"), "fetch_ms": alone}
  return found


def bytes_per_token(
  subject: Subject, store: RowStore
) -> dict[str, dict[str, float]]:
  """Packed bytes that a host store reads per token of the prompts and after."""
  with decoder_of(subject, store, prefetch=False) as decoder:
    marks = [store.statistics]
    prompts = dataclasses.replace(subject, new_tokens=0)
    for tokens, lengths in prompts.batches:
      state = decoder.init_state(len(lengths), subject.capacity)
      logits, state = decoder.start(state, tokens, lengths)()
    marks.append(store.statistics)
    for _ in range(subject.new_tokens):
      logits, state = decoder.start(state, _likeliest(logits))()
    marks.append(store.statistics)
  counts = (
    # Padding is read too: its rows are a few, always the same.
    subject.prompt_tokens,
    subject.new_tokens * len(subject.batches[-1][1]),
  )

  def per_token(before: ReadStatistics, after: ReadStatistics, tokens: int):
    return {
      "rows_asked": (after.rows_asked - before.rows_asked) / tokens,
      "rows_read": (after.rows_read - before.rows_read) / tokens,
      "bytes_read": (after.bytes_read - before.bytes_read) / tokens,
    }

  return {
    phase: per_token(marks[i], marks[i + 1], counts[i])
    for i, phase in enumerate(("prefill", "decode"))
  }


def resident_set(*, home: str, preset: str, row_format: str, **prompts: int):
  """What a process holds that decodes from one home; in a child of its own.

  Returns:
    `anonymous_mib` and, of files, `mapped_mib`: resident after one run.
  """
  subject, width = subject_of(preset, **prompts)
  fmt = RowFormat(row_format, width)
  with contextlib.ExitStack() as stack:
    packed = make_rows(subject.hashing.num_rows, fmt)
    if home == "resident":
      tables = to_tables(packed, fmt)
      parts = subject.hashing, subject.compression
      decoder = TableDecoder(subject.model, tables, *parts)
    else:
      if home == "host":
        store = HostStore(packed, fmt)
      else:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = pathlib.Path(folder) / "rows"
        store = FileStore(write_rows(path, packed, subject.hashing, fmt))
      decoding = decoder_of(subject, store, prefetch=True)
      decoder = stack.enter_context(decoding)
    del packed
    run(subject, decoder)
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    kib = {x.split(":")[0]: x.split()[1] for x in status if x.endswith("kB")}
  return {
    "anonymous_mib": int(kib["RssAnon"]) / 1024,
    "mapped_mib": int(kib["RssFile"]) / 1024,
    "rows_mib": fmt.bytes_per_row
    * sum(subject.hashing.num_rows.values())
    / harness.MIB,
  }


def subject_of(preset: str, **prompts: int) -> tuple[Subject, int]:
  """The preset's model and prompts, and the width of its rows."""
  config = find_preset(preset).model
  require(config.engram, "preset", preset, "a model with a memory")
  return make_subject(config, **prompts), config.engram.head_dim


def to_tables(
  packed: Mapping[int, np.ndarray], row_format: RowFormat
) -> dict[int, jax.Array]:
  """The numbers that packed rows stand for, float32 [R, d] per layer."""
  unpack = jax.jit(unpack_rows, static_argnums=1)
  return {i: unpack(jnp.asarray(x), row_format) for i, x in packed.items()}


# --- the figures ---


def hidden(
  case: Mapping[str, float],
  resident: Mapping[str, float],
  phase: str,
  fetch_ms: float,
) -> float:
  """Share of a fetch that did not make a step longer; may leave 0..1."""
  more = case[f"{phase}_ms"] - resident[f"{phase}_ms"]
  return 1 - more / fetch_ms


def measure(
  subject: Subject,
  packed: Mapping[int, np.ndarray],
  row_format: RowFormat,
  folder: pathlib.Path,
  *,
  repeats: int,
  delays_ms: Sequence[float],
) -> dict[str, Any]:
  """All homes in turns, and the curve over a store's latency."""
  host = HostStore(packed, row_format)
  file = write_rows(folder / "rows", packed, subject.hashing, row_format)
  stores = {"host": host, "file": FileStore(file)}
  parts = subject.hashing, subject.compression
  tables = to_tables(packed, row_format)
  resident = TableDecoder(subject.model, tables, *parts)
  alone = pieces(subject, stores, repeats=repeats)
  with contextlib.ExitStack() as stack:

    def of(store, prefetch):
      return stack.enter_context(decoder_of(subject, store, prefetch=prefetch))

    decoders = {"resident": resident}
    for name, store in stores.items():
      decoders[name] = of(store, False)
      decoders[f"{name}, prefetch"] = of(store, True)
    found = in_turns(subject, decoders, repeats=repeats)
    curve = []
    for delay in delays_ms:
      slow = SlowStore(host, delay_s=delay / 1e3)
      cases = {
        "resident": resident,
        "without": of(slow, False),
        "with": of(slow, True),
      }
      times = in_turns(subject, cases, repeats=repeats)
      point = {"delay_ms": delay}
      for phase in ("prefill", "decode"):
        base = times["resident"][phase]
        fetch = alone[phase]["fetch_ms"]["host"] + delay
        point[phase] = {
          "without": times["without"][phase] / base,
          "with": times["with"][phase] / base,
          "hidden": hidden(times["with"], times["resident"], phase, fetch),
        }
      curve.append(point)
  for name, case in found.items():
    for phase in ("prefill", "decode"):
      case[f"{phase}_ratio"] = case[phase] / found["resident"][phase]
      if name.endswith("prefetch"):
        fetch = alone[phase]["fetch_ms"][name.split(",")[0]]
        share = hidden(case, found["resident"], phase, fetch)
        case[f"{phase}_hidden"] = share
  verdict = {
    f"{name}, {phase}": {
      "ratio": found[f"{name}, prefetch"][f"{phase}_ratio"],
      "at_least": target,
      "reached": found[f"{name}, prefetch"][f"{phase}_ratio"] >= target,
    }
    for name, target in TARGETS.items()
    for phase in ("prefill", "decode")
  }
  return {
    "cases": found,
    "alone": alone,
    "per_token": bytes_per_token(subject, host),
    "latency": curve,
    "targets": verdict,
  }


# --- the program ---


def define_flags() -> None:
  harness.define_common("offload", repeats=3)
  flags.DEFINE_string("preset", "small", "Of engram_jax/presets.py.")
  flags.DEFINE_string("row_format", "fp8", "Of the packed rows.")
  flags.DEFINE_integer("prompts", 16, "How many; a multiple of --batch.")
  flags.DEFINE_integer("shortest", 25, "Tokens; lengths are uniform.")
  flags.DEFINE_integer("longest", 256, "Tokens.")
  flags.DEFINE_integer("batch", 8, "Prompts at a time.")
  flags.DEFINE_integer("new_tokens", 32, "After the last batch of prompts.")
  delays = ["0", "5", "10", "20", "50"]
  flags.DEFINE_list("delays_ms", delays, "Of the store made slower.")
  flags.DEFINE_bool("quick", False, "Small and short: does it work?")


def tables_of(result: Mapping[str, Any]) -> list[str]:
  """The figures for the terminal."""
  header = (
    "rows in",
    "prefill tokens/s",
    "of resident",
    "hidden",
    "decode tokens/s",
    "of resident",
    "hidden",
    "resident set, MiB",
    "of files",
  )
  rows = []
  for name, case in result["cases"].items():
    memory = result["memory"].get(name.split(",")[0], {})
    if name in TARGETS:  # measured with prefetch
      memory = {}
    row = [name]
    for phase in ("prefill", "decode"):
      row += [case[phase], case[f"{phase}_ratio"], case.get(f"{phase}_hidden")]
    row += [memory.get("anonymous_mib"), memory.get("mapped_mib")]
    rows.append(row)
  header_curve = (
    "latency, ms",
    "prefill without",
    "with prefetch",
    "hidden",
    "decode without",
    "with prefetch",
    "hidden",
  )
  curve = [
    [point["delay_ms"]]
    + [
      point[phase][key]
      for phase in ("prefill", "decode")
      for key in ("without", "with", "hidden")
    ]
    for point in result["latency"]
  ]
  lines = []
  for phase, figures in result["alone"].items():
    fetches = ", ".join(
      f"{name} {ms:.3g}" for name, ms in figures["fetch_ms"].items()
    )
    each = result["per_token"][phase]
    lines.append(
      f"{phase}: a fetch alone takes {fetches} ms, the blocks below the memory "
      f"{figures['below_ms']:.3g} ms; {each['rows_asked']:.0f} rows asked, "
      f"{each['rows_read']:.1f} read, {each['bytes_read']:.0f} bytes per token"
    )
  return [
    harness.aligned(header, rows),
    "\n".join(lines),
    "a slower store, of resident\n" + harness.aligned(header_curve, curve),
    "\n".join(
      f"{name}: {x['ratio']:.3f} of resident, aim {x['at_least']}: "
      + ("reached" if x["reached"] else "missed")
      for name, x in result["targets"].items()
    ),
  ]


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Throughput against the store's latency."""
  points = result["latency"]
  delays = [point["delay_ms"] for point in points]
  lines = {
    f"{phase}, {text}": (delays, [100 * point[phase][key] for point in points])
    for phase in ("prefill", "decode")
    for key, text in (("with", "prefetch"), ("without", "no prefetch"))
  }
  plot_lines(
    lines,
    path,
    title="Rows from a slow store",
    xlabel="latency of the store (ms)",
    ylabel="throughput (% of resident)",
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  if args.quick:
    for name, value in QUICK.items():
      args.set_default(name, value)
  names = ("prompts", "shortest", "longest", "batch", "new_tokens")
  prompts = {name: getattr(args, name) for name in names}
  fields = dict(preset=args.preset, row_format=args.row_format, **prompts)
  memory = {
    home: harness.in_child(f"{HERE}:resident_set", home=home, **fields)
    for home in ("resident", "host", "file")
  }
  subject, width = subject_of(args.preset, **prompts)
  row_format = RowFormat(args.row_format, width)
  packed = make_rows(subject.hashing.num_rows, row_format)
  with tempfile.TemporaryDirectory() as folder:
    result = measure(
      subject,
      packed,
      row_format,
      pathlib.Path(folder),
      repeats=args.repeats,
      delays_ms=[float(x) for x in args.delays_ms],
    )
  result = {**fields, "repeats": args.repeats, "memory": memory, **result}
  harness.publish(result, tables_of(result))
  plot(result, pathlib.Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
  harness.launch(define_flags, main)
