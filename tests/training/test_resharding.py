"""A checkpoint is read on other devices than those that wrote it.

Tables are padded there to other numbers of rows. What is padding comes and
goes; everything else must fit, as for any checkpoint.
"""

import gc
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import engram_jax
from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import row_sparse
from engram_jax.memory.row_transformations import scale_by_adam_per_row
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.state import TrainState, flatten, unflatten

PROGRAM = """
import dataclasses, pathlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import AxisType
from engram_jax.run_config import MeshConfig
from engram_jax.memory.row_sparse import dense, row_sparse
from engram_jax.memory.row_transformations import scale_by_adam_per_row
from engram_jax.parameters import param
from engram_jax.sharding import make_mesh, padded_rows, state_shardings
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.state import TrainState, flatten, unflatten

# Nine rows on eight devices: three of these hold nothing but padding.
ROWS = {1: 101, 3: 101, 14: 9}
METADATA = {"hash": {"layers": [1, 3, 14],
                     "primes": [[47, 54], [50, 51], [2, 7]]}}
OPTIMIZERS = {1: row_sparse(scale_by_adam_per_row()),
              3: dense(optax.scale_by_adam(b2=0.95)),
              14: row_sparse(optax.scale_by_adam())}

def build(devices):
  params = nnx.State({"moe_blocks": {"ffn": {
    "gate": jax.vmap(lambda x: param(x, axes=("expert", "embed", "mlp")))(
      jnp.zeros((2, 6, 5, 4))),
    "router": param(jnp.zeros(7), axes=("width",))
  }}})
  tables = {
    i: jnp.zeros((padded_rows(r, devices), 8), "bfloat16" if i == 14 else None)
    for i, r in ROWS.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32), params=params,
    balance=nnx.State({"bias": param(jnp.zeros(6), axes=("width",))}),
    opt_state=optax.adamw(1.0).init(params), tables=tables,
    table_states={i: OPTIMIZERS[i].init(t) for i, t in tables.items()})

def template(data, expert, tensor, axis_type=AxisType.Auto):
  '''Shapes and shardings on the first data * expert * tensor devices.'''
  count = data * expert * tensor
  config = MeshConfig(data=data, expert=expert, tensor=tensor)
  mesh = make_mesh(config, devices=jax.devices()[:count], axis_type=axis_type)
  state = jax.eval_shape(lambda: build(count))
  if mesh is None:
    return state
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                             sharding=sharding),
    state, state_shardings(state, mesh))

def is_padded(name, leaf):
  return name.startswith("table") and leaf.ndim > 0

def draw():
  '''Random leaves by name, without padding.'''
  rng = np.random.default_rng(0)
  leaves = {}
  for name, leaf in flatten(template(1, 1, 1)).items():
    value = np.asarray(rng.normal(scale=99, size=leaf.shape)).astype(leaf.dtype)
    if value.ndim == 2:
      # The last row that counts begins and ends like padding.
      value[-1, :] = 0
      value[-1, 3] = -0.0
    leaves[name] = value
  leaves["step"] = np.int32(1)
  return leaves

def place(leaves, target):
  '''The state of these leaves, padded and spread like `target`.'''
  def padded(name, like):
    value = np.zeros(like.shape, like.dtype)
    value[tuple(slice(n) for n in leaves[name].shape)] = leaves[name]
    return jax.device_put(value, like.sharding)
  flat = flatten(target)
  return unflatten(target, {k: padded(k, x) for k, x in flat.items()})

def check(state, target, leaves):
  found = flatten(state)
  assert found.keys() == leaves.keys()
  for name, like in flatten(target).items():
    x = found[name]
    assert (x.shape, x.dtype) == (like.shape, like.dtype), name
    if like.sharding is None:
      assert x.sharding.device_set == {jax.devices()[0]}, name
    else:
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim), name
    expected = leaves[name]
    value = np.asarray(x)
    if is_padded(name, x):
      assert not np.any(np.frombuffer(value[len(expected):].tobytes(), "u1"))
      value = value[:len(expected)]
    assert value.tobytes() == expected.tobytes(), name

def save(folder, state):
  with Checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
    checkpoints.save(1, state, run_metadata=METADATA)

def restore(folder, target):
  with Checkpoints.open(folder) as checkpoints:
    return checkpoints.restore(target)

assert jax.device_count() == 8
folder, leaves = pathlib.Path(sys.argv[1]), draw()
written_on = template(4, 2, 1)
tables = written_on.tables
assert {i: t.shape[0] for i, t in tables.items()} == {1: 104, 3: 104, 14: 16}
assert tables[1].sharding.shard_shape(tables[1].shape) == (13, 8)
mu = written_on.table_states[1].mu
assert mu.sharding.shard_shape(mu.shape) == (13, 8)
state = place(leaves, written_on)
check(state, written_on, leaves)
save(folder / "8", state)

# Of all of these the padding differs, or the mesh, or what they are made of.
for target in (
  written_on, template(2, 2, 2), template(8, 1, 1, AxisType.Explicit),
  template(2, 2, 1), template(2, 1, 1), template(1, 3, 2), template(3, 1, 1),
  template(1, 1, 1),
):
  check(restore(folder / "8", target), target, leaves)

# From each to the next.
last = "8"
for axes in ((2, 2, 1), (1, 1, 1), (1, 1, 2), (2, 2, 2)):
  target = template(*axes)
  state = restore(folder / last, target)
  check(state, target, leaves)
  last = "x".join(map(str, axes))
  save(folder / last, state)
check(restore(folder / last, written_on), written_on, leaves)

with Checkpoints.open(folder / "8") as checkpoints:
  target = template(2, 1, 1)
  params, _, tables = checkpoints.restore_weights(target)
  for i, rows in ROWS.items():
    assert tables[i].shape == target.tables[i].shape
    assert tables[i].sharding == target.tables[i].sharding
    found = np.asarray(tables[i])[:rows]
    assert found.tobytes() == leaves[f"tables/{i}"].tobytes()
"""


def test_any_devices_read_what_others_wrote(tmp_path):
  root = pathlib.Path(engram_jax.__file__).parent.parent
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", PROGRAM, tmp_path],
    env=os.environ
    | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]


# --- on one device: what is refused ---

ROWS, PADDED, WIDTH = 101, 104, 8
HASH = {"layers": [1], "primes": [[47, 54]]}


def make_state(rows: int = PADDED, width: int = WIDTH) -> TrainState:
  """Random in the rows in use, zero in the others."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    value = np.zeros((rows, *shape), np.float32)
    used = min(rows, ROWS)
    value[:used] = 1 + rng.random((ROWS, *shape))[:used]
    return jnp.asarray(value)

  table = draw(width)
  row_state = row_sparse(scale_by_adam_per_row()).init(table)
  return TrainState(
    step=jnp.asarray(1, jnp.int32),
    # Of the shape and name of a table, and none.
    params=nnx.State({1: nnx.Param(jnp.ones((PADDED, 2)))}),
    balance=nnx.State({}),
    opt_state=(),
    tables={1: table},
    table_states={
      1: row_state._replace(
        mu=draw(width),
        nu=draw(width),
        count=draw().astype(jnp.int32),
      )
    },
  )


def changed(state: TrainState, **leaves) -> TrainState:
  """The state with other leaves: `tables__1` stands for `tables/1`."""
  named = {name.replace("__", "/"): leaf for name, leaf in leaves.items()}
  flat = flatten(state)
  assert named.keys() <= flat.keys()
  return unflatten(state, flat | named)


def save(folder, state, metadata):
  with Checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
    checkpoints.save(1, state, run_metadata=metadata)


def restore(folder, rows: int = ROWS, **leaves):
  template = jax.eval_shape(lambda: make_state(rows))
  with Checkpoints.open(folder) as checkpoints:
    return checkpoints.restore(changed(template, **leaves))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  save(folder, make_state(), {"hash": HASH})
  return folder


@pytest.mark.parametrize("rows", [ROWS, PADDED])
def test_one_device_reads_with_and_without_padding(saved, rows):
  found, expected = flatten(restore(saved, rows)), flatten(make_state(rows))
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, strict=True)


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


STORED = r"float32\[104, 8\] in the checkpoint with 101 rows in use"


@pytest.mark.parametrize(
  ("rows", "leaves", "message"),
  [
    # Fewer rows than the hash can name.
    (100, {}, rf"memory/tables/1: {STORED}; valid: float32\[100, 8\]"),
    # More than padding explains: the template of a larger hash.
    (102, {}, rf"memory/tables/1: {STORED}; valid: float32\[102, 8\]"),
    (211, {}, rf"memory/tables/1: {STORED}; valid: float32\[211, 8\]"),
    (
      ROWS,
      {"tables__1": struct(ROWS, 9)},
      rf"memory/tables/1: {STORED}; valid: float32\[101, 9\]",
    ),
    (
      ROWS,
      {"tables__1": struct(ROWS)},
      rf"memory/tables/1: {STORED}; valid: float32\[101\]",
    ),
    (
      ROWS,
      {"tables__1": struct()},
      rf"memory/tables/1: {STORED}; valid: float32\[\]",
    ),
    (
      ROWS,
      {"tables__1": struct(ROWS, WIDTH, dtype=jnp.bfloat16)},
      rf"memory/tables/1: {STORED}; valid: bfloat16\[101, 8\]",
    ),
    (
      ROWS,
      {"table_states__1__nu": struct(99, WIDTH)},
      rf"optimizer/table_states/1/nu: {STORED}; valid: float32\[99, 8\]",
    ),
    (
      ROWS,
      {"table_states__1__count": struct(dtype=jnp.int32)},
      r"optimizer/table_states/1/count: int32\[104\] in .*; valid: int32\[\]",
    ),
    # Only tables have padding, whatever the shapes.
    (
      ROWS,
      {"params__1": struct(ROWS, 2)},
      r"backbone/params/1: float32\[104, 2\] in the checkpoint; valid: "
      r"float32\[101, 2\]",
    ),
  ],
)
def test_what_is_not_padding_is_refused(saved, rows, leaves, message):
  with pytest.raises(InputError, match=f"^{message}$"):
    restore(saved, rows, **leaves)


def test_a_checkpoint_of_another_hash_is_refused(tmp_path):
  # Its tables have 97 and 107 rows in use, ours 101.
  for rows in (97, 107):
    state = make_state(112)
    metadata = {"hash": HASH | {"primes": [[43, rows - 43]]}}
    save(tmp_path / str(rows), state, metadata)
    message = (
      rf"^memory/tables/1: float32\[112, 8\] in the checkpoint with {rows} "
      r"rows in use; valid: float32\[101, 8\]$"
    )
    with pytest.raises(InputError, match=message):
      restore(tmp_path / str(rows))


@pytest.mark.parametrize(
  "metadata",
  [
    {},
    {"hash": None},
    {"hash": {"multipliers": [[3, 5]]}},
    # A hash without this layer.
    {"hash": HASH | {"layers": [2]}},
  ],
)
def test_without_a_hash_shapes_are_exact(tmp_path, metadata):
  save(tmp_path, make_state(), metadata)
  message = (
    r"^memory/tables/1: float32\[104, 8\] in the checkpoint; valid: "
    r"float32\[101, 8\]$"
  )
  with pytest.raises(InputError, match=message):
    restore(tmp_path)
  assert restore(tmp_path, PADDED).tables[1].shape == (PADDED, WIDTH)


def test_what_has_fewer_rows_than_the_hash_is_never_padded(tmp_path):
  whole = jnp.zeros((), jnp.int32)
  cases = {
    "memory/tables/1": make_state(100),
    "optimizer/table_states/1/count": changed(
      make_state(), table_states__1__count=whole
    ),
  }
  for number, (name, state) in enumerate(cases.items()):
    folder = tmp_path / str(number)
    save(folder, state, {"hash": HASH})
    with pytest.raises(InputError, match=f"^{name}: .* in the checkpoint; val"):
      restore(folder)
    # And as it is, it comes back.
    with Checkpoints.open(folder) as checkpoints:
      found = checkpoints.restore(state)
    for key, leaf in flatten(state).items():
      np.testing.assert_array_equal(flatten(found)[key], leaf, strict=True)


def test_rows_that_are_not_zero_are_never_dropped(tmp_path):
  table = make_state().tables[1].at[-1, -1].set(1e-30)
  save(tmp_path, changed(make_state(), tables__1=table), {"hash": HASH})
  assert restore(tmp_path, PADDED).tables[1][-1, -1] == np.float32(1e-30)
  message = r"^memory/tables/1: not what was saved; valid: an undamaged check"
  with pytest.raises(InputError, match=message):
    restore(tmp_path)


# Orbax leaves its other reads behind when one fails.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine"
)
def test_damaged_files_are_refused_with_other_padding(tmp_path):
  save(tmp_path, make_state(), {"hash": HASH})
  expected = flatten(make_state(ROWS))
  rng = np.random.default_rng(0)
  refused = 0
  items = [tmp_path / "1" / item for item in ("memory", "optimizer")]
  files = sorted(p for item in items for p in item.rglob("*") if p.is_file())
  for number, file in enumerate(files):
    whole = file.read_bytes()
    flipped = bytearray(whole)
    if whole:
      flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    for damaged in (bytes(flipped), whole[: len(whole) // 2 * (number % 2)]):
      file.write_bytes(damaged)
      try:
        found = flatten(restore(tmp_path))
      except InputError as error:
        assert "\n" not in str(error)
        refused += 1
      else:
        for name, leaf in expected.items():
          np.testing.assert_array_equal(found[name], leaf, strict=True)
    file.write_bytes(whole)
  assert refused >= 10, refused
  # Here, where the warnings are filtered.
  gc.collect()
