"""How much memory generation needs, and how much there is."""

import pathlib
from typing import Any

import jax

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.forward import init_cache
from engram_jax.decoding.weights import DecodingModel, for_decoding
from engram_jax.errors import require


def require_room(
  model: Transformer | DecodingModel,
  *,
  slots: int,
  prompt: int,
  capacity: int,
  max_new_tokens: int,
) -> None:
  """Refuses caches that cannot fit, before anything is allocated.

  Args:
    model: whose caches they are.
    slots: sequences decoded at once.
    prompt: tokens of the longest prompt, padding included.
    capacity: tokens that each sequence has room for.
    max_new_tokens: the number to blame.

  Raises:
    InputError: positions beyond int32, or more bytes than the device has free.
  """
  valid = "few enough that prompt and new tokens are below 2**31 positions"
  require(capacity < 2**31, "max_new_tokens", max_new_tokens, valid)
  needed = decoding_bytes(model, slots=slots, prompt=prompt, capacity=capacity)
  there = available_bytes()
  require(
    there is None or needed <= there,
    "max_new_tokens",
    max_new_tokens,
    f"fewer: room for {capacity:,} tokens, {slots} sequences at once, takes "
    f"{needed:,} bytes at least, and {there or 0:,} are free",
  )


def decoding_bytes(
  model: Transformer | DecodingModel, *, slots: int, prompt: int, capacity: int
) -> int:
  """Bytes that `generate` takes at least, besides the model: nothing is made.

  Args:
    model: whose caches they are.
    slots: sequences decoded at once.
    prompt: tokens of the longest prompt.
    capacity: tokens that each sequence has room for.

  Returns:
    The caches, and the float32 scores of the prompts' attention to them in one
    layer, where they are not made in blocks.
  """
  caches = jax.eval_shape(
    lambda model: init_cache(for_decoding(model), slots, capacity), model
  )
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
  attention = model.config.attention
  if not 0 < attention.block_size < prompt:
    total += 4 * slots * attention.num_heads * prompt * capacity
  return total


def available_bytes() -> int | None:
  """Bytes that the first device has free; None where nobody says.

  For a CPU: what the machine, the control group and the process limit leave.
  """
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    found: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" not in found:
      return None
    return found["bytes_limit"] - found.get("bytes_in_use", 0)
  free = [_machine(), _control_group(), _process()]
  free = [max(0, number) for number in free if number is not None]
  return min(free, default=None)


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text()
  except (OSError, UnicodeDecodeError):
    return ""


def _machine() -> int | None:
  for line in _read("/proc/meminfo").splitlines():
    if line.startswith("MemAvailable:"):
      return int(line.split()[1]) * 1024
  return None


def _control_group() -> int | None:
  """What a container may still take; files in its cache can be dropped."""
  groups = [x for x in _read("/proc/self/cgroup").split() if x[:3] == "0::"]
  folders = {"/sys/fs/cgroup", *("/sys/fs/cgroup" + x[3:] for x in groups)}
  free = []
  for folder in folders:
    limit = _read(f"{folder}/memory.max").strip()
    used = _read(f"{folder}/memory.current").strip()
    if limit.isdigit() and used.isdigit():
      lines = _read(f"{folder}/memory.stat").splitlines()
      stat = dict(line.split() for line in lines)
      cached = int(stat.get("inactive_file", 0))
      free.append(int(limit) - int(used) + cached)
  return min(free, default=None)


def _process() -> int | None:
  try:
    import resource
  except ImportError:  # not a Unix
    return None
  limit = resource.getrlimit(resource.RLIMIT_AS)[0]
  if limit == resource.RLIM_INFINITY:
    return None
  pages = _read("/proc/self/statm").split()
  return limit - (int(pages[0]) * resource.getpagesize() if pages else 0)
