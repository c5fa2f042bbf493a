"""What the programs share: configs from files and flags, errors in one line.

Exit statuses:
  0    done; or training that a first SIGTERM or SIGINT has ended with a save
  1    something went wrong on the way: a lost process, a defect
  2    what a user can mend: a field, a file, a folder, a full disk
  3    a run has diverged: its numbers are no longer finite
  130  interrupted by SIGINT, 143 by SIGTERM, as a shell reports them
"""

import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from engram_jax.config_dicts import from_dict, to_dict
from engram_jax.errors import (
  InputError,
  NonFiniteError,
  first_line,
  require,
)
from engram_jax.run_config import ExperimentConfig
from engram_jax.training import processes
from engram_jax.training.divergence import DivergedError
from engram_jax.training.stopping import StoppedError, second_signal_ends
from experiments import console


def as_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The config as the mutable thing that `--config.x.y=z` changes."""

  def convert(value: Any) -> Any:
    if isinstance(value, dict):
      items = {name: convert(item) for name, item in value.items()}
      return ml_collections.ConfigDict(items)
    if value is None:
      return ml_collections.config_dict.placeholder(object)
    return tuple(value) if isinstance(value, list) else value

  return convert(to_dict(config))


def flag_values(module: str) -> flags.FlagValues:
  """Where a program that others import too defines its flags.

  The flags of the command line, if `module` (its `__name__`) is the program
  that runs; else apart, so that two programs may have flags of one name.
  """
  return flags.FLAGS if module == "__main__" else flags.FlagValues()


def define_config(
  flag_values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder:
  """The flag `--config=FILE.py`, whose fields are flags too."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file; override a field by --config.train.steps=10",
    flag_values=flag_values,
  )
  flag = flag_values["config"]
  flag.parser = _ConfigFile(flag.parser)
  return holder


class _ConfigFileError(Exception):
  """What is wrong with a config file; not a ValueError, as absl adds to it."""


class _ConfigFile(flags.ArgumentParser):
  """A parser of config files that tells their errors in one line.

  Args:
    parser: that of ml_collections.
  """

  def __init__(self, parser: flags.ArgumentParser):
    super().__init__()
    self._parser = parser

  def parse(self, argument: Any) -> ml_collections.ConfigDict:
    path = str(argument).partition(":")[0]
    try:
      open(path).close()
      config = self._parser.parse(argument)
      config.to_dict()  # of a file that is missing it is an error of its own
      for given in sys.argv[1:]:
        _require_field(config, given)
      return config
    except Exception as error:  # the file is a program: of any kind
      causes = [error]
      while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)
      for cause in causes:
        if isinstance(cause, InputError):
          raise _ConfigFileError(cause) from None
      if isinstance(error, (TypeError, ValueError)) and len(causes) > 1:
        error = causes[1]  # without the text of its traceback
      trace = traceback.walk_tb(error.__traceback__)
      lines = [n for f, n in trace if f.f_code.co_filename == path]
      why = f"line {lines[-1]}: " if lines else ""
      why += f"{type(error).__name__}: {first_line(error)}"
      valid = f"a Python file whose get_config() gives a ConfigDict ({why})"
      raise _ConfigFileError(InputError("config", argument, valid)) from None

  def flag_type(self) -> str:
    return self._parser.flag_type()


def _require_field(config: ml_collections.ConfigDict, given: str) -> None:
  """Refuses an argument of the command line that overrides what is not there.

  Args:
    config: the file's config.
    given: an argument; only those like `--config.model.x=1` are looked at.

  Raises:
    InputError: the config has no such field.
  """
  found = re.fullmatch(r"--?(no)?config\.([^=]+)=?(.*)", given, re.DOTALL)
  if not found:
    return
  path, group = "config", config
  for name in found[2].split("."):
    name = name.partition("[")[0]  # of a tuple's entry
    field = f"config.{found[2]}"
    value = found[3] or "given"
    valid = f"a field of a group of fields: {path} is {group!r}"
    is_group = isinstance(group, ml_collections.ConfigDict)
    require(is_group, field, value, valid)
    valid = f"a field of {path}: {', '.join(sorted(group))}"
    require(name in group, field, value, valid)
    path, group = f"{path}.{name}", group[name]


def define_processes() -> Callable[[], None]:
  """The flags that make several processes one run; `run` takes the result."""
  coordinator = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for a run of several."
  )
  count = flags.DEFINE_integer("num_processes", None, "How many there are.")
  index = flags.DEFINE_integer("process_id", None, "Which this is, from 0.")
  detect = flags.DEFINE_bool(
    "distributed", False, "Find the three in the cluster: Slurm, MPI, TPU, ..."
  )
  lost_after = flags.DEFINE_integer(
    "lost_after",
    processes.LOST_AFTER,
    "Seconds without a sign of life after which a process counts as lost.",
  )
  return lambda: processes.initialize(
    coordinator=coordinator.value,
    num_processes=count.value,
    process_id=index.value,
    detect=detect.value,
    lost_after=lost_after.value,
  )


def frozen(config: ml_collections.ConfigDict) -> ExperimentConfig:
  """The checked, immutable config.

  Raises:
    InputError: a field that is unknown, missing, or does not fit.
  """
  return from_dict(ExperimentConfig, config.to_dict())


def run(
  main: Callable[[Sequence[str]], Any],
  *,
  start_processes: Callable[[], None] = lambda: None,
) -> None:
  """`app.run`, where a user's mistake ends in one line and exit status 2.

  Args:
    main: the program.
    start_processes: from `define_processes`; called first.
  """

  def fail(message: str, status: int) -> None:
    console.stdout_failure()
    print(f"error: {message}", file=sys.stderr)
    processes.fail(status)

  def check_stdout() -> None:
    failure = console.stdout_failure()
    if isinstance(failure, BrokenPipeError):
      # As of `head`: who read has read enough, and that is no error to tell.
      processes.fail(console.READER_GONE)
    if failure is not None:
      fail(f"stdout: {failure.strerror}; valid: a place to write to", 1)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return app.parse_flags_with_usage(argv)
    except (_ConfigFileError, AttributeError, KeyError, ValueError) as error:
      # How ml_collections speaks of an unknown field, or one of what is None.
      fail(" ".join(str(error.args[-1]).split()), 2)

  def guarded(argv: Sequence[str]) -> None:
    # The programs say what they do themselves; Orbax and TFDS would say more.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(_is_not_told_twice)
    console.prepare_stdout()
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
    try:
      with second_signal_ends():
        start_processes()
        with processes.reporting_lost_processes():
          main(argv)
          check_stdout()
          processes.shut_down()
    except InputError as error:
      fail(str(error), 2)
    except DivergedError as error:
      fail(str(error), 3)
    except NonFiniteError as error:
      fail(str(error), 1)
    except StoppedError as error:
      fail(str(error), 128 + signal.SIGTERM)
    except KeyboardInterrupt:
      # Not by way of the interpreter's end, which waits for every thread.
      print("error: interrupted", file=sys.stderr)
      processes.leave(128 + signal.SIGINT)
    except OSError as error:
      check_stdout()
      # The system's refusals that nothing nearer has put in words.
      what = error.filename or type(error).__name__
      fail(f"{what}: {error.strerror or first_line(error)}", 2)
    except MemoryError as error:
      fail(f"memory: {first_line(error)}; valid: a smaller size", 2)
    except processes.ProcessLostError as error:
      print(f"error: {error}", file=sys.stderr)
      processes.leave(1)
    except Exception as error:
      check_stdout()
      if "Unable to initialize backend" in str(error):
        # What JAX_PLATFORMS asks for is not there.
        fail(" ".join(str(error).split()), 1)
      if not jax.distributed.is_initialized():
        raise
      traceback.print_exc()
      processes.fail(1)

  app.run(guarded, flags_parser=parse)


def _is_not_told_twice(record) -> bool:
  """Whether a line of the log is to be seen.

  Orbax and asyncio print the traceback of every write that fails, and the
  error is raised as well.
  """
  raised = record.name == "asyncio" or "/orbax/" in record.pathname
  return not (raised and record.levelno >= 40)  # ERROR


def _without_closed_loops(hook: Callable[[Any], None]) -> Callable[..., None]:
  """An unraisablehook without the echo of writes that have failed.

  TensorStore tells an event loop of each, which the first one has closed.
  """

  def filtered(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  return filtered


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
  """Two columns of text under a title, for the terminal."""
  width = max(len(name) for name, _ in rows)
  lines = [f"{name:<{width}}  {value}" for name, value in rows]
  return "\n".join([title, "-" * len(title), *lines])
