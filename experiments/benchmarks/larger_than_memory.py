"""Generation from a row file that is larger than the machine's memory.

  python -m experiments.benchmarks.larger_than_memory --file=rows.bin

A model with a memory of --gib in a row file on disk (made first if it is not
there: as long as the disk takes to write it), reading text: prompts from
different places of a corpus, each continued with its own next tokens, so that
the n-grams are those of real text and the same in every case. Per size of the
cache of hot rows on the device, and always with prefetch:

  cold    nothing of the file in the page cache at the start
  warm    the same tokens again, from a cache of hot rows that starts empty, of
          a file whose pages for these tokens are in the page cache

Before the tokens that are timed the model reads --before others, which fill
the cache of hot rows. The scale is the same model with small tables on the
device: what a step costs without any fetch; the median of as many runs, each
beside one of the others.
"""

import contextlib
import os
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from engram_jax.analysis.accounting import counting_hash
from engram_jax.analysis.plots import plot_lines
from engram_jax.data.pipeline import windows
from engram_jax.data.prepared import prepare
from engram_jax.decoding.decoders import Decoder, TableDecoder
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.hot_rows import CachedStore
from engram_jax.memory.quantization import RowFormat
from engram_jax.memory.row_file_headers import Header
from engram_jax.memory.row_files import RowFile, write_row_file
from engram_jax.memory.stores import FileStore
from engram_jax.presets import preset as find_preset
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.offload_runs import (
  POOL,
  Subject,
  decoder_of,
  make_rows,
  make_subject,
  to_tables,
  with_memory_of,
  with_rows,
)
from experiments.configs.preset import experiment_of

#: Rows of a head in the resident tables, which are the scale.
FEW = 4096


def make_file(
  path: pathlib.Path, hashing: NgramHash, row_format: RowFormat
) -> tuple[RowFile, float | None]:
  """The file, made if it is not there, and the seconds that it took.

  Row r of a layer holds row (r mod `POOL`) of its random ones.
  """
  pool = make_rows(dict.fromkeys(hashing.layers, POOL), row_format)
  seconds = None
  if not path.exists():
    start = time.perf_counter()

    def chunks(layer: int, rows: int) -> Iterator[np.ndarray]:
      for first in range(0, rows, POOL):
        yield pool[layer][: min(POOL, rows - first)]

    header = Header(row_format, hashing.num_rows, hashing)
    numbers = hashing.num_rows.items()
    write_row_file(path, {i: chunks(i, n) for i, n in numbers}, header)
    seconds = time.perf_counter() - start
  file = RowFile(path, hashing=hashing)
  rng = np.random.default_rng(1)
  for layer, rows in hashing.num_rows.items():
    ids = np.sort(rng.integers(0, rows, 1000))
    out = np.empty((len(ids), row_format.bytes_per_row), np.uint8)
    file.read(layer, ids, out)
    same = np.array_equal(out, pool[layer][ids % POOL])
    require(same, "file", path, "one that this program made")
  return file, seconds


def read_text(preset: str, batch: int, length: int) -> np.ndarray:
  """int32 [B, L], tokens from different places of the preset's corpus."""
  prepared = prepare(experiment_of(preset).data)
  text = windows(prepared, "train", seq_len=length)
  valid = f"at most {text.windows}, as there are {text.tokens} tokens"
  require(text.windows >= batch, "batch", batch, valid)
  stride = (text.tokens - length) // batch
  return np.stack(
    [text.read(i * stride, i * stride + length) for i in range(batch)]
  )


def follow(
  decoder: Decoder, text: np.ndarray, *, prompt: int, before: int
) -> Iterator[None]:
  """Reads a text: a prompt, then token by token.

  Yields:
    Once when `before` tokens after the prompt were read, and at the end.
  """
  batch, length = text.shape
  state = decoder.init_state(batch, length)
  start = jnp.asarray(text[:, :prompt])
  lengths = jnp.full(batch, prompt, jnp.int32)
  logits, state = decoder.start(state, start, lengths)()
  for i in range(prompt, length):
    # As if the token came of these.
    jax.block_until_ready(logits)
    if i == prompt + before:
      yield
    logits, state = decoder.start(state, text[:, i])()
  jax.block_until_ready(logits)
  yield


def timed(decoder: Decoder, text: np.ndarray, at_mark=None, **parts) -> float:
  """Tokens/s of what comes after `before`; `at_mark` is called there."""
  steps = follow(decoder, text, **parts)
  next(steps)
  if at_mark is not None:
    at_mark()
  start = time.perf_counter()
  next(steps)
  seconds = time.perf_counter() - start
  count = text.shape[1] - parts["prompt"] - parts["before"]
  return text.shape[0] * count / seconds


def measure(
  subject: Subject,
  resident: Decoder,
  file: RowFile,
  text: np.ndarray,
  *,
  caches_mib: Sequence[float],
  prompt: int,
  before: int,
) -> dict[str, Any]:
  """Throughput against the size of the cache; arguments as the flags."""
  parts = dict(prompt=prompt, before=before)
  timed(resident, text, **parts)  # compiles
  points, scales = [], []
  for mib in caches_mib:
    point = {"cache_mib": mib}
    # The first compiles all programs of this size.
    for name in ("unmeasured", "cold", "warm"):
      store = FileStore(file)
      cache = None
      if mib:
        size = int(mib * harness.MIB)
        cache = CachedStore(store, capacity_bytes=size)
      marks = []

      def at_mark(name=name, store=store, cache=cache, marks=marks):
        if name == "cold":
          file.release_pages()
        marks.append((store.statistics, cache and cache.by_layer))

      with decoder_of(subject, cache or store, prefetch=True) as decoder:
        speed = timed(decoder, text, at_mark, **parts)
      if name == "unmeasured":
        continue
      scales.append(timed(resident, text, **parts))
      (first, layers), last = marks[0], store.statistics
      tokens = text.shape[0] * (text.shape[1] - prompt - before)
      point[name] = {
        "tokens_per_s": speed,
        "rows_read_per_token": (last.rows_read - first.rows_read) / tokens,
      }
      if cache is not None:
        hits, misses = (
          sum(getattr(cache.by_layer[i], field) for i in layers)
          - sum(getattr(x, field) for x in layers.values())
          for field in ("hits", "misses")
        )
        point[name]["hit_rate"] = hits / max(1, hits + misses)
        point["capacity_rows"] = sum(cache.capacity.values())
    points.append(point)
  scale = statistics.median(scales)
  for point in points:
    for name in ("cold", "warm"):
      point[name]["of_resident"] = point[name]["tokens_per_s"] / scale
  return {"resident_tokens_per_s": sorted(scales), "caches": points}


# --- the program ---


def define_flags() -> None:
  out = str(harness.RESULTS / "larger_than_memory.json")
  flags.DEFINE_string("out", out, "Where it goes.")
  flags.DEFINE_string("file", None, "The row file; made if it is not there.")
  flags.DEFINE_bool("keep", False, "Do not remove the file at the end.")
  flags.DEFINE_string("preset", "small", "Of engram_jax/presets.py.")
  flags.DEFINE_float("gib", 40.0, "Of packed rows.")
  flags.DEFINE_string("row_format", "fp8", "Of the packed rows.")
  flags.DEFINE_integer("width", 256, "Numbers of a row.")
  flags.DEFINE_integer("batch", 8, "Sequences at a time.")
  flags.DEFINE_integer("prompt", 64, "Tokens read at once at the start.")
  flags.DEFINE_integer("before", 192, "Tokens read one by one, not timed.")
  flags.DEFINE_integer("tokens", 128, "Tokens read one by one, timed.")
  caches = [0, 4, 16, 64, 256]
  text = "Of hot rows; 0 for none."
  number_flags.define("caches_mib", caches, text, kind=float)
  flags.mark_flag_as_required("file")


def table_of(result: Mapping[str, Any]) -> str:
  """The figures for the terminal."""
  header = (
    "cache, MiB",
    "hit rate",
    "rows read/token",
    "cold tokens/s",
    "of resident",
    "warm tokens/s",
    "of resident",
  )
  rows = [
    [
      point["cache_mib"],
      point["warm"].get("hit_rate"),
      point["warm"]["rows_read_per_token"],
    ]
    + [
      point[name][key]
      for name in ("cold", "warm")
      for key in ("tokens_per_s", "of_resident")
    ]
    for point in result["caches"]
  ]
  return harness.aligned(header, rows)


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Throughput against the cache's size."""
  points = [point for point in result["caches"] if point["cache_mib"]]
  sizes = [point["cache_mib"] for point in points]
  plot_lines(
    {
      name: (sizes, [100 * point[name]["of_resident"] for point in points])
      for name in ("cold", "warm")
    },
    path,
    title=f"Rows in a file of {result['file_gib']:.1f} GiB",
    xlabel="cache of hot rows on the device (MiB)",
    ylabel="throughput (% of resident)",
    log_x=True,
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  require(args.caches_mib, "caches_mib", "none", "one or more sizes")
  require(args.tokens >= 1, "tokens", args.tokens, "an integer >= 1")
  own = find_preset(args.preset).model
  require(own.engram, "preset", args.preset, "a model with a memory")
  row_format = RowFormat(args.row_format, args.width)
  model = with_memory_of(own, args.gib, row_format)
  length = args.prompt + args.before + args.tokens
  text = read_text(args.preset, args.batch, length)
  file, seconds = make_file(
    pathlib.Path(args.file), counting_hash(model), row_format
  )
  fields = dict(prompts=1, shortest=1, longest=1, batch=1, new_tokens=2)
  subject = make_subject(model, **fields)
  hashing = counting_hash(with_rows(model, FEW))
  tables = to_tables(make_rows(hashing.num_rows, row_format), row_format)
  resident = TableDecoder(subject.model, tables, hashing, subject.compression)
  size = file.header.file_bytes
  with contextlib.ExitStack() as stack:
    if seconds is not None and not args.keep:
      stack.callback(os.remove, args.file)
    result = measure(
      subject,
      resident,
      file,
      text,
      caches_mib=args.caches_mib,
      prompt=args.prompt,
      before=args.before,
    )
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  result = {
    "preset": args.preset,
    "row_format": args.row_format,
    "width": args.width,
    "batch": args.batch,
    "tokens": args.tokens,
    "file_gib": size / harness.GIB,
    "machine_gib": memory / harness.GIB,
    "write_s": seconds,
    "peak_gib": harness.peak_memory() / harness.GIB,
    **harness.resident_memory(),
    **result,
  }
  speed = statistics.median(result["resident_tokens_per_s"])
  about = (
    f"a file of {result['file_gib']:.1f} GiB, a machine of "
    f"{result['machine_gib']:.1f} GiB; {speed:.0f} tokens/s with a small table "
    f"on the device; the process holds {result['anonymous_mib']:,.0f} MiB, and "
    f"{result['mapped_mib']:,.0f} MiB of files, which the system may take back"
  )
  harness.publish(result, [about, table_of(result)])
  plot(result, pathlib.Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
  harness.launch(define_flags, main)
