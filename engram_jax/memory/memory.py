"""Memory: everything that leads from token ids to rows, as one value.

  token ids --compression--> canonical ids --hash--> row ids --table--> rows

A `Memory` holds no array that is trained. Tables and the state of their
optimizer are values that go in and come out:

  memory = Memory.create(config, tokenizer)
  tables = memory.init_tables(key)                        {layer: [R, d]}
  row_tx = row_sparse(optax.scale_by_adam())
  row_state = memory.init_optimizer(row_tx, tables)

  found = memory.lookup(tables, tokens)                   in every step
  loss, (grads, row_grads) = value_and_grad(loss_fn, (0, 1))(model, found.rows)
  tables, row_state = memory.update(
    row_tx, tables, row_state, found, row_grads, learning_rate=5e-3
  )

A step costs what it touches if tables and state are donated to it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from engram_jax import sharding
from engram_jax.config import EngramConfig
from engram_jax.config_dicts import for_digest, from_dict, to_dict
from engram_jax.errors import InputError, require
from engram_jax.files import whole_file
from engram_jax.memory.addressing import address
from engram_jax.memory.breaks import resolve_breaks
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import (
  Lookup,
  Tables,
  apply_row_gradients,
  lookup_rows,
  reduce_row_gradients,
  require_tables,
)
from engram_jax.memory.npz_files import read_npz
from engram_jax.memory.row_sparse import RowOptimizer
from engram_jax.memory.table import init_tables
from engram_jax.stores.open_store import open_store
from engram_jax.stores.prefetch import (
  read_to_device,
  require_rows,
  row_ids_on_host,
)
from engram_jax.stores.program_stores import ProgramStore
from engram_jax.stores.store import RowStore, unpack
from engram_jax.types import RowIds, Rows

# Of a batch, on the device or still on the host.
TokenArray = Int[Array | np.ndarray, "B L"]
BreakArray = TokenArray | Bool[Array | np.ndarray, "B L"]
HistoryArray = Int[Array | np.ndarray, "B history"]

_FORMAT = "engram_jax.Memory/1"
_FIELDS = ("config", "hash", "canonical_ids", "digest")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
  """Config, token compression and hash of a model's memory; frozen.

  Two are equal, and hash equally, when all three are, wherever they come from.
  To JAX a memory is static: it may be closed over, or given to a jitted
  function like any argument; an equal one compiles nothing again.

  Attributes:
    config: sizes of the memory and its fusion.
    compression: the map from token ids to canonical ids.
    hashing: multipliers and primes of every Engram layer.
    digest: hex sha256 of all three.

  Raises:
    InputError: a hash that is not the config's, or not over the compression's
      canonical ids.
  """

  config: EngramConfig
  compression: TokenCompression
  hashing: NgramHash
  digest: str = dataclasses.field(init=False)

  def __post_init__(self):
    config, hashing = self.config, self.hashing
    found, wanted = hashing.vocab_size, self.compression.size
    valid = f"{wanted}, the compression's canonical ids"
    require(found == wanted, "hashing.vocab_size", found, valid)
    ok = config.compress or wanted == self.vocab_size
    valid = f"{self.vocab_size} with compress = False"
    require(ok, "compression.size", wanted, valid)
    found, wanted = (
      (*x.layers, x.heads, x.max_order, x.smallest_order)
      for x in (hashing, config)
    )
    name = "hashing: layers, heads, max_order, smallest_order"
    require(found == wanted, name, found, f"{wanted}, the config's")
    fields = for_digest(EngramConfig, to_dict(config))
    parts = (fields, self.compression.digest, hashing.to_dict())
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    object.__setattr__(self, "digest", digest)

  @classmethod
  def create(
    cls,
    config: EngramConfig,
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
  ) -> "Memory":
    """Draws the hash of a new memory over a tokenizer's canonical ids.

    Args:
      config: sizes of the memory; `config.pad_id` is a token id, which is
        compressed here.
      tokenizer: a `tokenizers.Tokenizer`, a fast Hugging Face tokenizer, or
        the path of a `tokenizer.json`; all that counts without
        `config.compress` is how many tokens it has.
      vocab_size: number of token ids, in place of a tokenizer: every id is
        then a canonical id.

    Raises:
      InputError: not exactly one of tokenizer and vocab_size; a tokenizer of
        another kind; a pad id that is no token; what `NgramHash.create`
        refuses.
    """
    if (tokenizer is None) == (vocab_size is None):
      found = "neither" if tokenizer is None else "both"
      valid = "one of the two"
      raise InputError("tokenizer and vocab_size", found, valid)
    if tokenizer is not None:
      compression = TokenCompression.from_tokenizer(tokenizer)
      vocab_size = compression.vocab_size
    if tokenizer is None or not config.compress:
      compression = TokenCompression.identity(vocab_size)
    return cls.from_compression(config, compression)

  @classmethod
  def from_compression(
    cls, config: EngramConfig, compression: TokenCompression
  ) -> "Memory":
    """`create` with a compression that is already there.

    Args:
      config: sizes of the memory.
      compression: from a tokenizer, a list of texts or a file.

    Raises:
      InputError: as `create`.
    """
    vocab_size = compression.vocab_size
    valid = f"a token id, 0 <= id < {vocab_size}"
    ok = 0 <= config.pad_id < vocab_size
    require(ok, "pad_id", config.pad_id, valid)
    hashing = NgramHash.create(
      vocab_size=compression.size,
      rows_per_head=config.rows_per_head,
      heads=config.heads,
      layers=config.layers,
      pad_id=int(compression.canonical_ids[config.pad_id]),
      seed=config.seed,
      smallest_order=config.smallest_order,
    )
    return cls(config, compression, hashing)

  # --- sizes ---

  @property
  def layers(self) -> tuple[int, ...]:
    """The Engram layers, in the order in which the hash took its primes."""
    return self.hashing.layers

  @property
  def vocab_size(self) -> int:
    """V, number of token ids."""
    return self.compression.vocab_size

  @property
  def num_rows(self) -> dict[int, int]:
    """R per Engram layer, without padding."""
    return self.hashing.num_rows

  # --- token ids to rows ---

  def row_ids(
    self,
    tokens: TokenArray,
    *,
    breaks: BreakArray | None = None,
    segment_ids: TokenArray | None = None,
    positions: TokenArray | None = None,
    history: HistoryArray | None = None,
  ) -> dict[int, RowIds]:
    """The rows that each position reads.

    Args:
      tokens: int32 [B, L], token ids; a negative one is a position without
        text.
      breaks: [B, L] of `Break`, or bool for document starts only.
      segment_ids: [B, L], in place of breaks: the document of each position in
        a packed batch, 0 for padding; see `breaks_from_segments`.
      positions: [B, L], beside segment_ids: each token's place in its document.
      history: int32 [B, N-1], the canonical ids before; see
        `NgramHash.next_history`. None at the start of a sequence.

    Returns:
      int32 [B, L, K] per Engram layer.

    Raises:
      InputError: a token id of V or more (outside jit), both breaks and
        segment_ids, or a wrong shape.
    """
    breaks = resolve_breaks(breaks, segment_ids, positions)
    breaks, history = (
      None if x is None else jnp.asarray(x) for x in (breaks, history)
    )
    canonical = self.compression(jnp.asarray(tokens))
    return self.address(
      self.hashing.hash(canonical, history=history, breaks=breaks)
    )

  def row_ids_numpy(
    self,
    tokens: TokenArray,
    *,
    breaks: BreakArray | None = None,
    segment_ids: TokenArray | None = None,
    positions: TokenArray | None = None,
    history: HistoryArray | None = None,
  ) -> dict[int, Int[np.ndarray, "B L K"]]:
    """`row_ids` on the host: the same numbers, int64, tables of any size.

    Args:
      tokens: integers [B, L], token ids; a negative one is a position without
        text.
      breaks: see `row_ids`.
      segment_ids: see `row_ids`.
      positions: see `row_ids`.
      history: see `row_ids`.
    """
    breaks = resolve_breaks(breaks, segment_ids, positions)
    canonical = self.compression(np.asarray(tokens))
    return self.address(
      row_ids_on_host(self.hashing, canonical, history=history, breaks=breaks)
    )

  def address(self, row_ids: Mapping[int, Any]) -> dict[int, Any]:
    """The rows that are read, of the hash's [B, L, K] per Engram layer.

    Args:
      row_ids: JAX's or NumPy's.
    """
    return address(row_ids, self.config.addressing, self.hashing)

  def lookup(
    self,
    tables: Tables | RowStore,
    tokens: TokenArray,
    *,
    breaks: BreakArray | None = None,
    segment_ids: TokenArray | None = None,
    positions: TokenArray | None = None,
    history: HistoryArray | None = None,
    strategy: str | None = None,
    capacity: int | None = None,
  ) -> Lookup:
    """The rows that a batch reads, from tables or from a store.

    Args:
      tables: [R, d] per Engram layer, under a mesh spread over all its devices;
        or a `RowStore`. Stores in host memory or a file are read outside jit.
      tokens: int32 [B, L], as for `row_ids`, and so are the next four.
      breaks: see `row_ids`.
      segment_ids: see `row_ids`.
      positions: see `row_ids`.
      history: see `row_ids`.
      strategy: under a mesh, how rows travel; see `exchange.lookup`.
      capacity: under a mesh, distinct rows that one device may ask of another;
        None for any number. With one, look at `Lookup.is_complete`.

    Raises:
      InputError: as `row_ids`; tables or a store of another memory; a host
        store inside jit.
    """
    context = dict(
      breaks=breaks,
      segment_ids=segment_ids,
      positions=positions,
      history=history,
    )
    if isinstance(tables, Mapping):
      require_tables(tables, self.num_rows)
      row_ids = self.row_ids(tokens, **context)
      return lookup_rows(tables, row_ids, strategy=strategy, capacity=capacity)
    return self._lookup_in_store(tables, tokens, context)

  def _lookup_in_store(self, store: RowStore, tokens, context) -> Lookup:
    require_rows(store, self.hashing)
    if isinstance(tokens, jax.core.Tracer):
      name = f"{type(store).__name__} inside jit"
      valid = "tables, or a store on the device; look up before the jitted step"
      require(isinstance(store, ProgramStore), "store", name, valid)
      row_ids = self.row_ids(tokens, **context)
      packed = store.read(row_ids)
    else:
      row_ids = self.row_ids_numpy(np.asarray(tokens), **context)
      packed = read_to_device(store, row_ids)
    return Lookup(unpack(packed, store.row_format), row_ids)

  # --- tables that learn ---

  def init_tables(
    self, key: PRNGKeyArray | Array
  ) -> dict[int, Float[Array, "_R d"]]:
    """New tables, each of N(0, `config.table_init_std`^2).

    Under a mesh (`jax.set_mesh`) every device makes its own rows alone, and the
    rows are padded with zeros to a multiple of the devices. Also to be traced.

    Args:
      key: a JAX random key.

    Returns:
      float32 [R, d] per Engram layer; but for rounding, the same on any mesh.
    """
    width, std = self.config.head_dim, self.config.table_init_std
    return init_tables(key, self.num_rows, width, std=std)

  def init_optimizer(
    self, row_optimizer: RowOptimizer, tables: Tables
  ) -> dict[int, Any]:
    """The state of a row optimizer, per Engram layer, spread as its table.

    Args:
      row_optimizer: from `row_sparse`, `dense` or `sinkhorn`.
      tables: [R, d] per Engram layer.

    Raises:
      InputError: tables of another memory.
    """
    require_tables(tables, self.num_rows)
    mesh = sharding.current_mesh()
    if mesh is None or isinstance(next(iter(tables.values())), jax.core.Tracer):
      return {i: row_optimizer.init(table) for i, table in tables.items()}
    states = {}
    for layer, table in tables.items():
      shapes = jax.eval_shape(row_optimizer.init, table)
      split = functools.partial(sharding.table_spec, rows=table.shape[0])
      specs = jax.tree.map(split, shapes)
      states[layer] = jax.jit(row_optimizer.init, out_shardings=specs)(table)
    return states

  def update(
    self,
    row_optimizer: RowOptimizer,
    tables: Tables,
    states: Mapping[int, Any],
    found: Lookup,
    gradients: Mapping[int, Rows],
    *,
    learning_rate: Float[Array, ""] | float | None = None,
  ) -> tuple[dict[int, Array], dict[int, Any]]:
    """Moves the rows that a batch read, and leaves all others as they are.

    Gradients of equal rows are summed first. A lookup that was not complete
    (`Lookup.is_complete`) moves nothing.

    Args:
      row_optimizer: from `row_sparse`, `dense` or `sinkhorn`.
      tables: [R, d] per Engram layer; to be donated.
      states: from `init_optimizer` or the step before; to be donated.
      found: what `lookup` returned for the batch.
      gradients: [B, L, K, d] per Engram layer, with respect to `found.rows`.
      learning_rate: None for an optimizer that has one of its own.

    Returns:
      Tables and states after the step.

    Raises:
      InputError: gradients that are not those of the rows; a learning rate
        missing, or one too many.
    """
    row_gradients = reduce_row_gradients(found, gradients, tables)

    def apply(tables, states):
      return apply_row_gradients(
        row_optimizer, tables, states, row_gradients, learning_rate
      )

    tables, states = dict(tables), dict(states)
    if found.capacity is None:
      return apply(tables, states)
    return jax.lax.cond(
      found.is_complete, apply, lambda *same: same, tables, states
    )

  # --- rows elsewhere ---

  def open_store(
    self, location: str, tables: Tables | None = None, **options: Any
  ) -> RowStore:
    """A store of this memory's rows, of the kind that a word names.

    Args:
      location: `device`, `pinned`, `host` or `file:PATH`.
      tables: [R, d] per Engram layer, to be packed; None for a file.
      **options: as of `open_store`: `row_format`, `verify`,
        `cache_bytes`.

    Raises:
      InputError: as `open_store`: above all, a file of another memory.
    """
    return open_store(
      location,
      tables,
      self.hashing,
      compression_digest=self.compression.digest,
      **options,
    )

  # --- storage ---

  def save(self, path: str | os.PathLike) -> None:
    """Writes the memory to one small file, which appears whole or not at all.

    Args:
      path: the file, an .npz whatever its name.

    Raises:
      InputError: a folder that does not exist or cannot be written to.
    """
    with whole_file(path) as file:
      np.savez_compressed(
        file,
        format=np.array(_FORMAT),
        config=np.array(json.dumps(to_dict(self.config))),
        hash=np.array(json.dumps(self.hashing.to_dict())),
        canonical_ids=self.compression.canonical_ids.astype("<i4"),
        digest=np.array(self.digest),
      )

  @classmethod
  def load(
    cls, path: str | os.PathLike, *, digest: str | None = None
  ) -> "Memory":
    """Reads a file of `save`; nothing is drawn anew, nothing in it executed.

    Args:
      path: the file.
      digest: digest that it must have, e.g. a checkpoint's; None for any.

    Raises:
      InputError: a file that is missing, truncated, altered or of another
        format, or that holds another memory than the one asked for.
    """
    path = pathlib.Path(path).expanduser()
    stored = read_npz(path, _FIELDS, format=_FORMAT, writer="Memory.save")
    memory = cls(
      from_dict(EngramConfig, json.loads(str(stored["config"]))),
      TokenCompression.from_canonical_ids(stored["canonical_ids"]),
      NgramHash.from_dict(json.loads(str(stored["hash"]))),
    )
    found = str(stored["digest"])
    valid = f"{memory.digest}, that of its content: the file was altered"
    require(found == memory.digest, f"digest of {path}", found, valid)
    wanted = digest in (None, found)
    require(wanted, f"digest of {path}", found, str(digest))
    return memory

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Memory) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  def __repr__(self) -> str:
    rows = ", ".join(f"{i}: {n:,}" for i, n in self.num_rows.items())
    return (
      f"Memory(rows per layer {{{rows}}}, width {self.config.head_dim}, "
      f"{self.vocab_size:,} token ids, digest {self.digest[:12]})"
    )
