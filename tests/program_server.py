"""A process that has imported what the programs need, and forks for each.

A program starts in a few seconds, nearly all of them imports. The tests start
more than a hundred; `ProgramServer.start` gives each as a fork of one process
that has imported JAX and the rest, but has initialized no backend, started no
thread and parsed no flags. What the fork cannot be given as a new interpreter
would be, `start` gives to a new interpreter:

  the environment  JAX's own variables and XLA_FLAGS may differ from the
                   server's; with any other, it is not forked
  the streams      stdout and stderr are pipes

Tests of the locale, of arguments that are no text and of streams that are
closed start their programs themselves.
"""

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from tests.forked_program import ForkedProgram

ROOT = Path(__file__).parents[1]
#: Most bytes of a request: mainly the environment.
REQUEST = 1 << 17
#: Variables that may be set after JAX's import: XLA reads its flags when a
#: backend is initialized, what pytest tells concerns no program, and the last
#: is set by an import, in the server as in the tests' process.
LATE = {"XLA_FLAGS", "PYTEST_CURRENT_TEST", "CRC32C_SW_MODE"}


class ProgramServer:
  """Starts programs; a context manager, whose end ends the server."""

  def __init__(self):
    self._requests, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    self._env = dict(os.environ)
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.program_server", str(theirs.fileno())],
        cwd=ROOT,
        env=self._env,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # Pipes, as the programs' own streams: Python's know if they can seek.
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )

  def __enter__(self) -> "ProgramServer":
    return self

  def __exit__(self, *_: object) -> None:
    self._requests.close()
    _, err = self._process.communicate()
    print(err, end="", file=sys.stderr)

  def threads(self) -> int:
    """Threads of the server: a lock that another holds stays so in a fork."""
    return len(os.listdir(f"/proc/{self._process.pid}/task"))

  def start(
    self,
    module: str,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
  ) -> ForkedProgram | subprocess.Popen:
    """`python -m module arguments`, with pipes of text as stdout and stderr.

    Args:
      module: name of the program.
      arguments: its command line.
      cwd: the folder that it starts in.
      env: its environment, as for `subprocess.Popen`.
    """
    env = dict(os.environ if env is None else env)
    args = [sys.executable, "-m", module, *arguments]
    changed = {k: v for k, v in env.items() if self._env.get(k) != v}
    if not (env.keys() >= self._env.keys() and _can_be_set(changed)):
      pipe = subprocess.PIPE
      return subprocess.Popen(
        args, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True
      )
    request = [module, arguments, str(cwd), env, changed]
    (out, child_out), (err, child_err) = os.pipe(), os.pipe()
    reports, child_reports = socket.socketpair(type=socket.SOCK_SEQPACKET)
    fds = [child_out, child_err, child_reports.detach()]
    data = json.dumps(request).encode()
    assert len(data) < REQUEST
    socket.send_fds(self._requests, [data], fds)
    for fd in fds:
      os.close(fd)
    return ForkedProgram(args, [out, err], reports)


def _can_be_set(changed: Mapping[str, str]) -> bool:
  """Whether these variables still have effect after JAX's import."""
  return all(x.lower() in jax.config.values for x in changed.keys() - LATE)


# --- in the server and its forks ---


def serve(requests: socket.socket) -> list | None:
  """Forks for each request until the tests' process ends.

  Returns:
    In a program's process the request, streams and folder set; in the server,
    and in the processes that wait for the programs, None.
  """
  while True:
    data, fds, _, _ = socket.recv_fds(requests, REQUEST, 3)
    with contextlib.suppress(ChildProcessError):
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass  # one that has waited for a program
    if not data:
      return None
    if os.fork() == 0:
      break
    for fd in fds:
      os.close(fd)
  requests.close()
  out, err, reports = fds
  pid = os.fork()
  if pid:
    # The pipes end with the program.
    for fd in (1, 2, out, err):
      os.close(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(reports, str(pid).encode())
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    os.write(reports, str(code).encode())
    os._exit(0)
  os.dup2(out, 1)
  os.dup2(err, 2)
  for fd in fds:
    os.close(fd)
  request = json.loads(data)
  os.chdir(request[2])
  return request


def become(request: list) -> None:
  """Runs the program, as `python -m` would; as there, it ends as it likes."""
  module, arguments, _, env, changed = request
  os.environ.update(env)  # beside what imports have set
  for name in changed.keys() - LATE:
    value = changed[name]
    now = jax.config.values[name.lower()]
    if isinstance(now, bool):
      value = value.lower() in ("y", "yes", "t", "true", "on", "1")
    elif isinstance(now, (int, float)):
      value = type(now)(value)
    jax.config.update(name.lower(), value)
  random.seed()
  np.random.seed()
  sys.path[0] = os.getcwd()
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def preload() -> None:
  """Imports what programs import, but no module that defines their flags."""
  import gc
  import importlib
  import pkgutil

  package = importlib.import_module("engram_jax")
  for module in pkgutil.walk_packages(package.__path__, "engram_jax."):
    importlib.import_module(module.name)
  others = ("tensorflow_datasets", "tokenizers", "experiments.cli")
  for name in (*others, "experiments.results"):
    importlib.import_module(name)
  gc.freeze()  # the forks share the memory until they write to it


if __name__ == "__main__":
  _requests = socket.socket(fileno=int(sys.argv[1]))
  preload()
  _request = serve(_requests)
  if _request is not None:
    become(_request)
