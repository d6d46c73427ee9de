"""Helpers for the command line: arguments, errors, interrupts, files."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Windows has no SIGHUP.
TERMINATION_SIGNALS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
PART = ".srcnn.part"  # how temporary files end


class CommandError(Exception):
    """What went wrong and what to do about it, in one line for the user."""


# ---------------------------------------------------------------------------- arguments


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with examples below the help, and one line per mistake instead of the whole usage."""

    def __init__(self, examples: str = "", **options: Any) -> None:
        epilog = f"examples:\n{examples}" if examples else None
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, epilog=epilog, **options)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Refuse what is unknown here, so that an unknown option of a subcommand names that subcommand's help."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def integer(minimum: int = 1, multiple_of: int = 1) -> Callable[[str], int]:
    """An argparse type for integers from ``minimum`` up to 2^31 that are multiples of ``multiple_of``."""
    kind = "a positive integer" if minimum == 1 else f"an integer, {minimum} or greater"
    kind = f"a positive multiple of {multiple_of}" if multiple_of > 1 else kind

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**31 or value % multiple_of:
            raise argparse.ArgumentTypeError(f"must be {kind} (below 2^31), not {text!r}")
        return value

    return check


def positive_float(text: str) -> float:
    """An argparse type for finite numbers greater than zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive number (below 2^31), not {text!r}")
    return value


def path(text: str) -> Path:
    """An argparse type for paths. An empty text, as of an unset variable, would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not contain a null character")
    return Path(text)


# ------------------------------------------------------------------- errors and interrupts


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: status 0 when done, 1 with one line on stderr, 128 and its number after a signal."""
    for name in ("stdout", "stderr"):
        if not getattr(sys, name):  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    status, message = 0, ""
    try:
        with handle_signals(TERMINATION_SIGNALS, interrupt):
            main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (CommandError, OSError, MemoryError, RuntimeError) as error:
        status, message = 1, f"error: {describe_error(error)}\n"
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        status, message = 128 + number, "interrupted\n"
    with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
        sys.stderr.write(message)  # in one call, since several processes may write here
    sys.exit(status)


def describe_error(error: Exception) -> str:
    """One line for the user. Raises the error again if it is a bug of ours."""
    if isinstance(error, CommandError | OSError):
        return printable(error)
    if is_out_of_memory(error):
        return "out of memory; use a smaller --batch-size, --patch-size or --tile, or a smaller image"
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a lack of memory, of the CPU's or of a GPU's, is the reason of an error.

    cuDNN, when it has no room to work in, only says that it found no way to compute, and cuBLAS fails to start.
    """
    reasons = ("out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine")
    lacks_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return lacks_memory or (isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons))


def warn(message: str) -> None:
    """Print a warning to stderr, above any progress bar."""
    tqdm.write(f"WARNING: {printable(message)}", file=sys.stderr)


def printable(text: object) -> str:
    """Text of unknown origin with control characters escaped, since terminals interpret them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def plural(number: int, noun: str) -> str:
    """Return for example "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler: end as Ctrl-C does, so that temporary files are removed."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals, except for those that are ignored, as SIGHUP is under nohup."""
    heeded = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Defer the first SIGINT, SIGTERM or SIGHUP until the yielded function is called: it raises KeyboardInterrupt.

    TensorBoard's writer may deadlock if it is interrupted. A second Ctrl-C takes effect at once.
    """
    received: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_deferred() -> None:
        if received:
            raise KeyboardInterrupt(received[0])

    with handle_signals([signal.SIGINT, *TERMINATION_SIGNALS], defer):
        yield raise_deferred


# -------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[SimpleNamespace]:
    """A file to write that replaces ``path`` when it is complete, so that at any moment either is there in full.

    It has no ``fileno``: Pillow would use that to write past Python, and miss that a disk is full.
    """
    part = path.with_name(f".{path.name[:30]}.{os.getpid()}{PART}")  # no longer than a name may be
    try:
        with open(part, "w+b") as file, locked(part):
            yield SimpleNamespace(**{name: getattr(file, name) for name in ("read", "write", "seek", "tell", "flush")})
            file.flush()
            os.fsync(file.fileno())
            file.close()  # since Windows renames no open file
            os.replace(part, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder, and yield whether that worked: Windows and some network drives have no locks.

    Raises BlockingIOError if another process has locked it.
    """
    if not fcntl:
        yield False
        return
    number, works = os.open(path, os.O_RDONLY | os.O_NONBLOCK), True  # a pipe would block
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            works = False
        yield works
    finally:
        os.close(number)


def remove_stale_files(folder: Path, pattern: str = f".*{PART}") -> None:
    """Remove the temporary files, or folders, of processes that were killed. Those in use are locked."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError), locked(left) as works:
            if works:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, unless it exists. Raises CommandError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder {folder}: {error.strerror}") from error
