"""A model, its prompts, and runs of them with the rows in any home."""

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
from flax import nnx

from engram_jax.analysis.accounting import counting_hash
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.decoding.decoders import (
  Decoded,
  Decoder,
  StoreDecoder,
  TableDecoder,
)
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
  DeviceStore,
  FileStore,
  HostStore,
  ReadStatistics,
  RowStore,
)
from engram_jax.presets import preset as find_preset
from experiments.benchmarks import harness

#: Different rows of a table; they come again and again.
POOL = 2**16


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
  ok = new_tokens >= 2
  require(ok, "new_tokens", new_tokens, "2 or more: the first is not timed")
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


def with_memory_of(
  model: ModelConfig, gib: float, row_format: RowFormat
) -> ModelConfig:
  """The model with as many rows of the format as `gib` of packed ones are."""
  memory = model.engram
  per_layer = gib * harness.GIB / row_format.bytes_per_row / len(memory.layers)
  orders = len(memory.rows_per_head)
  rows = int(per_layer / (memory.heads * orders))
  require(rows >= 1000, "gib", gib, "rows enough: 1,000 or more for a head")
  memory = dataclasses.replace(memory, head_dim=row_format.width)
  return with_rows(dataclasses.replace(model, engram=memory), rows)


def with_rows(model: ModelConfig, rows: int) -> ModelConfig:
  """The model with so many rows for each head."""
  orders = len(model.engram.rows_per_head)
  memory = dataclasses.replace(model.engram, rows_per_head=(rows,) * orders)
  return dataclasses.replace(model, engram=memory)


def make_rows(
  num_rows: Mapping[int, int], row_format: RowFormat, *, seed: int = 0
) -> dict[int, np.ndarray]:
  """Random packed rows, uint8 [R, n] per layer; row r is row r mod `POOL`."""
  pack = jax.jit(pack_rows, static_argnums=1)
  packed = {}
  for layer, rows in num_rows.items():
    key = jax.random.fold_in(jax.random.key(seed), layer)
    shape = min(rows, POOL), row_format.width
    pool = np.array(pack(0.02 * jax.random.normal(key, shape), row_format))
    # Every page is one of its own.
    packed[layer] = np.resize(pool, (rows, row_format.bytes_per_row))
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
      rows = threads.enter_context(Prefetcher(store))
    yield StoreDecoder(subject.model, rows, *parts)


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prefill(subject: Subject, decoder: Decoder) -> Decoded:
  """Reads all prompts, batch after batch; what the last one leaves."""
  ends = []
  for tokens, lengths in subject.batches:
    state = decoder.init_state(len(lengths), subject.capacity)
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
    Per decoder, of the medians: `prefill`, `decode`, tokens/s; `prefill_ms`,
    milliseconds per batch; `decode_ms`, per step.

  Raises:
    RuntimeError: they do not draw the same tokens.
  """
  first = next(iter(decoders))
  taken = {name: {"prefill": [], "decode": []} for name in decoders}
  for turn in range(repeats + 1):
    states = {}
    for name, decoder in decoders.items():
      start = time.perf_counter()
      states[name] = prefill(subject, decoder)
      seconds = time.perf_counter() - start
      if turn:
        taken[name]["prefill"].append(seconds / len(subject.batches))
    for step in range(subject.new_tokens):
      tokens = {}
      for name, decoder in decoders.items():
        start = time.perf_counter()
        states[name], tokens[name] = decode(decoder, states[name])
        seconds = time.perf_counter() - start
        if turn and step:
          taken[name]["decode"].append(seconds)
      for name, new in tokens.items():
        if not np.array_equal(new, tokens[first]):
          raise RuntimeError(f"{name}: other tokens than {first}")
    print(f"turn {turn} of {repeats} is done", file=sys.stderr, flush=True)
  per_batch = subject.prompt_tokens / len(subject.batches)
  found = {}
  for name, of in taken.items():
    batch, step = (statistics.median(of[k]) for k in ("prefill", "decode"))
    found[name] = {
      "prefill": per_batch / batch,
      "decode": len(subject.batches[-1][1]) / step,
      "prefill_ms": 1e3 * batch,
      "decode_ms": 1e3 * step,
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
    decoded = prefill(subject, decoder)
    marks.append(store.statistics)
    for _ in range(subject.new_tokens):
      decoded, _ = decode(decoder, decoded)
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


def resident_decoder(
  subject: Subject,
  packed: Mapping[int, np.ndarray],
  row_format: RowFormat,
  *,
  as_packed: bool,
) -> Decoder:
  """Rows in the device's memory: as the packed ones, or as float32 tables."""
  parts = subject.hashing, subject.compression
  if as_packed:
    return StoreDecoder(subject.model, DeviceStore(packed, row_format), *parts)
  return TableDecoder(subject.model, to_tables(packed, row_format), *parts)


def resident_set(*, home: str, as_packed: bool, **fields: Any):
  """What a process holds that decodes from one home; in a child of its own.

  Returns:
    `anonymous_mib` and, of files, `mapped_mib`: resident after one run.
  """
  subject, fmt = subject_of(**fields)
  with contextlib.ExitStack() as stack:
    packed = make_rows(subject.hashing.num_rows, fmt)
    if home == "resident":
      decoder = resident_decoder(subject, packed, fmt, as_packed=as_packed)
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
    decode(decoder, prefill(subject, decoder))
    held = harness.resident_memory()
  return {
    **held,
    "rows_mib": fmt.bytes_per_row
    * sum(subject.hashing.num_rows.values())
    / harness.MIB,
  }


def subject_of(
  *,
  preset: str,
  layers: Sequence[int],
  row_format: str,
  gib: float,
  **prompts: int,
) -> tuple[Subject, RowFormat]:
  """The preset's model and prompts, and the format of its rows.

  Args:
    preset: of `engram_jax/presets.py`.
    layers: where its memory is instead; none for the preset's own.
    row_format: of the packed rows.
    gib: of packed rows; 0 for as many rows as the preset has.
    **prompts: see `make_subject`.
  """
  config = find_preset(preset).model
  require(config.engram, "preset", preset, "a model with a memory")
  if layers:
    memory = dataclasses.replace(config.engram, layers=tuple(layers))
    config = dataclasses.replace(config, engram=memory)
  fmt = RowFormat(row_format, config.engram.head_dim)
  if gib:
    config = with_memory_of(config, gib, fmt)
  return make_subject(config, **prompts), fmt


def to_tables(
  packed: Mapping[int, np.ndarray], row_format: RowFormat
) -> dict[int, jax.Array]:
  """The numbers that packed rows stand for, float32 [R, d] per layer."""
  unpack = jax.jit(unpack_rows, static_argnums=1)
  return {i: unpack(jnp.asarray(x), row_format) for i, x in packed.items()}
