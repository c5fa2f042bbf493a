"""What the code computes, to the bit, so that a change of it can be compared.

  python -m tests.fingerprint --out=experiments/results/fingerprint.json
  python -m tests.fingerprint \
    --compare=experiments/results/fingerprint.json

Two models, the preset `tiny` and a small one with the parts that the published
models have (streams, scanned and recomputed blocks, bfloat16, Muon), are
trained for some steps on the same random text, on one device and, in a process
of its own, on eight simulated ones. Written down are the hash of the reference
values, every array before and after these steps (as a checkpoint names them),
the losses, the losses of an evaluation, and what the trained models say, with
rows from every kind of store. `--compare` prints a line for each entry that is
not what the file says, and ends with status 1 if there is one.

It is no test: the figures are those of one version of JAX on one kind of
processor. What may be renamed is named in the first section alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from engram_jax import progress, sharding
from engram_jax.config import ModelConfig
from engram_jax.decoding.decoders import Decoder
from engram_jax.decoding.generate import generate_all, pad_prompts
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.memory import Memory
from engram_jax.presets import preset
from engram_jax.run_config import DEFAULT_MESH, MeshConfig, TrainConfig
from engram_jax.stores.open_store import pack_tables
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import write_row_file
from engram_jax.training.evaluation import losses_by_memory
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import flatten
from engram_jax.training.step import make_train_step
from experiments import results
from experiments.benchmarks import harness

# --- the names of the library ---

State = Any
Store = Any


def golden_ids(case: Mapping[str, Any], ids: np.ndarray) -> list[Any]:
  """Row ids of a text, by a hash of `tests/golden/hash.npz`.

  Within each head on the device, and with the heads' offsets on the host.
  """
  hashing = NgramHash.create(
    vocab_size=case["compressed_vocab_size"],
    rows_per_head=case["min_rows_per_order"],
    heads=case["heads_per_order"],
    layers=case["layer_ids"],
    pad_id=case["compressed_pad_id"],
    seed=case["seed"],
  )
  return [
    (hashing.head_ids(jnp.asarray(ids), i), hashing.row_ids_numpy(ids, i))
    for i in hashing.layers
  ]


#: The optimizer state's names when the fingerprint was made: ours, not optax's.
_FIRST_NAMES = {"count": "step", "mu": "mean", "nu": "variance"}


def _first_name(name: str) -> str:
  """The name of an array of a state as it was when the fingerprint was made."""
  if not name.startswith("table_states/"):
    return name
  stem, _, last = name.rpartition("/")
  return f"{stem}/{_FIRST_NAMES.get(last, last)}"


class Subject:
  """A model with its training, on one device or on a mesh.

  Args:
    model: sizes of the model.
    train: training config of the run.
    mesh: how the run is spread over all devices; None for one device.
  """

  def __init__(
    self, model: ModelConfig, train: TrainConfig, mesh: MeshConfig | None
  ):
    # Two neighbouring tokens are one to the hash, so that the map matters.
    canonical = np.arange(model.vocab_size) // 2
    compression = TokenCompression.from_canonical_ids(canonical)
    self.memory = Memory.from_compression(model.engram, compression)
    self.setup = TrainSetup.create(
      model,
      train,
      self.memory,
      mesh=None if mesh is None else sharding.make_mesh(mesh),
      mesh_config=mesh or DEFAULT_MESH,
    )

  def new_state(self) -> State:
    return self.setup.init_state()

  def take_steps(
    self, state: State, batches: list[Mapping[str, Any]]
  ) -> tuple[State, list[Mapping[str, Any]]]:
    """The state after a step on each batch, and the steps' metrics."""
    mesh, taken = self.setup.mesh, []
    batches = [sharding.place_batch(batch, mesh) for batch in batches]
    capacity = self.setup.lookup_capacity(batches[0]).rows
    step = make_train_step(self.setup, capacity=capacity)
    for batch in batches:
      state, metrics = step(state, batch)
      metrics = jax.device_get(metrics)
      if capacity is not None:
        assert metrics["lookup_needed"] <= capacity, "raise lookup_capacity"
      taken.append(metrics)
    return state, taken

  def arrays(self, state: State) -> dict[str, Any]:
    """Every array of the state by the name that it has in a checkpoint."""
    return {_first_name(name): leaf for name, leaf in flatten(state).items()}

  @contextlib.contextmanager
  def stores(
    self, state: State, folder: pathlib.Path
  ) -> Iterator[dict[str, Store]]:
    """Every kind of store of the state's rows; the tables are one."""
    tables, memory = state.tables, self.memory

    def written(name):
      packed, row_format = pack_tables(tables, memory.hashing, name)
      path = folder / f"{name}.rows"
      header = Header(
        row_format, memory.num_rows, memory.hashing, memory.compression.digest
      )
      write_row_file(path, {i: [x] for i, x in packed.items()}, header)
      return f"file:{path}"

    def opened(where, name, cache_bytes=0):
      given = None if where.startswith("file:") else tables
      return memory.open_store(
        where, given, row_format=name, cache_bytes=cache_bytes
      )

    cache = 2**16
    yield {
      "tables": TableStore(tables),
      "device": opened("device", "float32"),
      "pinned": opened("pinned", "float32"),
      "host": opened("host", "float32"),
      "host, cached": opened("host", "float32", cache),
      "host, int8": opened("host", "int8"),
      "file": opened(written("float32"), "float32"),
      "file, bfloat16, cached": opened(written("bfloat16"), "bfloat16", cache),
    }

  def text(
    self, state: State, store: Store, prompts: list[list[int]], **options
  ) -> list[list[int]]:
    """The tokens with which the model goes on; without a store, alone."""
    return generate_all(
      self.setup.merge_model(state),
      self.memory if store else None,
      store,
      prompts,
      key=jax.random.key(0),
      **options,
    )

  def logits(
    self, state: State, store: Store, prompts: list[list[int]], steps: int
  ) -> list[np.ndarray]:
    """The logits of a prompt and of some tokens after it."""
    model = self.setup.merge_model(state)
    decoder = Decoder(model, self.memory, store, prefetch=False)
    decoding = decoder.init_state(len(prompts), 64)
    vocab_size = self.setup.model.vocab_size
    padded = pad_prompts(prompts, vocab_size=vocab_size)
    logits, decoding = decoder.start(decoding, *padded)()
    found = [np.asarray(logits)]
    for _ in range(steps):
      tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      logits, decoding = decoder.start(decoding, tokens)()
      found.append(np.asarray(logits))
    return found

  def evaluated(
    self, state: State, store: Store, batches: list[Mapping[str, Any]]
  ) -> dict[str, float]:
    """Nats per token by how the memory is used."""
    model = self.setup.merge_model(state)
    return losses_by_memory(self.setup, model, store, lambda: batches)


# --- what is computed ---

_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_COMPARE = flags.DEFINE_string("compare", None, "JSON file to compare with.")

GOLDEN = results.ROOT / "tests" / "golden" / "hash.npz"
PROMPTS = [[5, 6, 7, 8, 9, 300, 301], [20], [3, 1, 4]]
STEPS, STEPS_OF_PARTS = 20, 4
#: Tokens of a training sequence.
LENGTH, LENGTH_OF_PARTS = 128, 32
EIGHT_DEVICES = MeshConfig(
  data=2, expert=2, tensor=2, lookup="exchange", lookup_capacity=4.0
)


def configs() -> dict[str, tuple[ModelConfig, TrainConfig, int]]:
  """The two models by name, with their training and their steps."""
  tiny = preset("tiny")
  model = tiny.model
  parts = dataclasses.replace(
    model,
    vocab_size=512,
    hidden_size=64,
    num_layers=6,
    attention=dataclasses.replace(model.attention, block_size=16),
    dense_size=64,
    moe=dataclasses.replace(model.moe, num_experts=8, expert_size=32),
    engram=dataclasses.replace(
      model.engram,
      hidden_size=64,
      layers=(2, 4),
      rows_per_head=(500, 700),
      streams=2,
      dtype="bfloat16",
    ),
    streams=2,
    tie_embeddings=False,
    scan_blocks=True,
    remat="block",
    dtype="bfloat16",
  )
  train = dataclasses.replace(
    tiny.train,
    optimizer="muon",
    seq_len=LENGTH_OF_PARTS,
    accumulation=2,
    loss_chunk=16,
  )
  return {
    "tiny": (model, dataclasses.replace(tiny.train, seq_len=LENGTH), STEPS),
    "parts": (parts, train, STEPS_OF_PARTS),
  }


def random_batches(
  train: TrainConfig, vocab_size: int, count: int
) -> list[dict[str, np.ndarray]]:
  """Batches [B, L] of documents in which few tokens are frequent."""
  # Its numbers are the same in every version of NumPy.
  random, shape = np.random.RandomState(0), (train.batch_size, train.seq_len)

  def batch():
    tokens = random.zipf(1.3, (shape[0], shape[1] + 1)) % vocab_size
    return {
      "inputs": tokens[:, :-1].astype(np.int32),
      "targets": tokens[:, 1:].astype(np.int32),
      "breaks": (random.random_sample(shape) < 0.02).astype(np.int8),
      "loss_mask": random.random_sample(shape) < 0.95,
    }

  return [batch() for _ in range(count)]


def digest(arrays: Any) -> str:
  """16 hexadecimal digits of dtype, shape and bytes of arrays."""
  found = hashlib.sha256()
  for array in jax.tree.leaves(arrays):
    array = np.ascontiguousarray(jax.device_get(array))
    found.update(f"{array.dtype}{list(array.shape)}".encode())
    found.update(array.tobytes())
  return found.hexdigest()[:16]


def spelled(text: list[list[int]]) -> str:
  """Token ids of sequences on one line."""
  return "; ".join(" ".join(map(str, tokens)) for tokens in text)


def golden() -> dict[str, str]:
  """The row ids of the reference's texts, by case."""
  found = {}
  with np.load(GOLDEN) as values:
    for case in json.loads(str(values["settings_json"])):
      name = case["name"]
      ids = values[f"{name}/token_ids"]
      if case["lookup"] == "modulo":
        ids = ids % case["compressed_vocab_size"]
      found[f"golden/{name}"] = digest(golden_ids(case, ids))
  return found


def of_training(
  name: str, mesh: MeshConfig | None
) -> tuple[dict[str, Any], Subject, State]:
  """Arrays before and after the steps of a model, and their losses."""
  model, train, steps = configs()[name]
  subject = Subject(model, train, mesh)
  batches = random_batches(train, model.vocab_size, steps)
  state = subject.new_state()
  found = {
    f"init/{array}": digest(x) for array, x in subject.arrays(state).items()
  }
  state, taken = subject.take_steps(state, batches)
  for metric in ("loss", "grad_norm"):
    numbers = [float(metrics[metric]).hex() for metrics in taken]
    found |= {f"{metric}/{i + 1}": x for i, x in enumerate(numbers)}
  for array, x in subject.arrays(state).items():
    found[f"checkpoint/{array}"] = digest(x)
  return found, subject, state


def of_inference(
  name: str, subject: Subject, state: State, folder: pathlib.Path
) -> dict[str, Any]:
  """Text, logits and losses, with rows from every kind of store."""
  model, train, _ = configs()[name]
  batches = random_batches(train, model.vocab_size, 1)
  options = dict(max_new_tokens=12)
  drawn = options | dict(temperature=1.0, top_k=50)
  found = {}
  with subject.stores(state, folder) as stores:
    for kind, store in stores.items():
      logits = subject.logits(state, store, PROMPTS, steps=3)
      found[f"logits/{kind}"] = digest(logits)
      for prefetch in (True,) if kind == "tables" else (True, False):
        label = f"{kind}, prefetch" if prefetch and kind != "tables" else kind
        more = dict(prefetch=prefetch)
        for how, chosen in (("greedy", options), ("drawn", drawn)):
          text = subject.text(state, store, PROMPTS, **chosen, **more)
          found[f"{how}/{label}"] = spelled(text)
      if kind in ("tables", "host", "host, int8"):
        losses = subject.evaluated(state, store, batches)
        for memory, loss in losses.items():
          found[f"evaluation/{memory}/{kind}"] = loss.hex()
    off = subject.text(state, None, PROMPTS, **options)
    two = subject.text(state, stores["host"], PROMPTS, slots=2, **options)
  off, two = map(spelled, (off, two))
  return found | {"greedy/off": off, "greedy/host, two slots": two}


def of_one_device() -> dict[str, Any]:
  """Everything that a process with one device computes."""
  values = golden()
  for name in configs():
    found, subject, state = of_training(name, None)
    progress.say(f"{name}: trained on one device")
    with tempfile.TemporaryDirectory() as folder:
      found |= of_inference(name, subject, state, pathlib.Path(folder))
    values |= {f"{name}/{entry}": value for entry, value in found.items()}
    progress.say(f"{name}: decoded and evaluated")
  return values


def of_eight_devices() -> dict[str, Any]:
  """The training of the same models, in a child with eight devices."""
  values = {}
  for name in configs():
    found, _, _ = of_training(name, EIGHT_DEVICES)
    found = {f"{name}/{entry}": value for entry, value in found.items()}
    values |= {f"eight/{entry}": value for entry, value in found.items()}
    progress.say(f"{name}: trained on eight devices")
  return values


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  """A line for each entry that is another one, missing or new."""
  lines = []
  for name in dict.fromkeys([*expected, *found]):
    one, other = found.get(name, "missing"), expected.get(name, "missing")
    if one != other:
      lines.append(f"{name}: {one}; was {other}")
  return lines


def main(argv: list[str]) -> int:
  del argv
  values, env = of_one_device(), harness.simulated_devices(8)
  values |= harness.in_child(of_eight_devices, env=env)
  del values["peak_mib"]  # which `in_child` adds
  if _OUT.value:
    results.write_result(_OUT.value, {"values": values})
  if not _COMPARE.value:
    return 0
  known = json.loads(pathlib.Path(_COMPARE.value).read_text())
  here, there = results.environment(), known["environment"]
  for field in ("python", "versions", "cpu", "cores"):
    if here[field] != there[field]:
      print(f"note: {field} is {here[field]}; was {there[field]}")
  lines = differences(values, known["values"])
  for line in lines:
    print(line)
  print(f"{len(values)} entries, {len(lines)} of them differ")
  return 1 if lines else 0


if __name__ == "__main__":
  app.run(main)
