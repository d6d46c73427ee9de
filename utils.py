"""Helpers for the command line: arguments, errors, interrupts, files."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import secrets
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from threading import Event, RLock
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
# Windows has no SIGHUP.
TERMINATION_SIGNALS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
TEMPORARY_SUFFIX = ".srcnn.part"  # suffix of incomplete files

OUT_OF_MEMORY = (
    *("out of memory", "allocate memory", "std::bad_alloc", "not enough memory"),  # the last on Windows
    *("ALLOC_FAILED", "unable to find an engine", "could not create a primitive", "could not create a memory object"),
)
OUT_OF_THREADS = ("can't start new thread", "Resource temporarily unavailable")  # Python and C++


class CommandError(Exception):
    """An error that the user can do something about. The message is one line that says what."""


# ---------------------------------------------------------------------------- arguments


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with examples below the help, and with usage errors in one line.

    ``hints`` maps options that do not exist, but that users of other programs may expect, to an option or advice.
    """

    def __init__(self, examples: str = "", hints: dict[str, str] | None = None, **options: Any) -> None:
        self.hints = hints or {}
        epilog = f"examples:\n{examples}" if examples else None
        formatter = argparse.RawDescriptionHelpFormatter
        # Without abbreviations, since --epoch would be one of --epoch-size but is meant as --num-epoch.
        super().__init__(formatter_class=formatter, epilog=epilog, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Report unknown arguments here, so that the error names the help of the subcommand."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *self.advice(unknown)]))
        return known, unknown

    def advice(self, unknown: list[str]) -> Iterator[str]:
        """Yield the hint or the most similar option for each unknown option, if there is one."""
        for name in (argument.partition("=")[0] for argument in unknown if argument.startswith("--")):
            names = [other for other in self._option_string_actions if other != "--help"]
            hint = self.hints.get(name, "")
            similar = [hint] if hint in names else difflib.get_close_matches(name[:30], names, n=1, cutoff=0.7)
            if hint and not hint.startswith("--"):
                yield hint
            elif similar:
                yield f"did you mean {similar[0]}?"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def integer(minimum: int = 1) -> Callable[[str], int]:
    """Return an argparse type for integers from ``minimum`` to 2^31 - 1."""
    kind = "a positive integer" if minimum == 1 else f"an integer, {minimum} or greater"

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be {kind} (below 2^31), not {text!r}")
        return value

    return check


def positive_float(text: str) -> float:
    """Parse a positive number below 2^31: an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive number (below 2^31), not {text!r}")
    return value


def path(text: str) -> Path:
    """Parse a path: an argparse type. An empty one, as from an unset variable, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not contain a null character")
    return Path(text)


# ------------------------------------------------------------------------------- output
# All output of the programs goes through these functions and run_command.


Message = tuple[str, bool]  # text, and whether it is for stderr
OUTPUT = RLock()  # held while a message is printed, or while the messages of libraries are discarded
COLLECTED: ContextVar[list[Message] | None] = ContextVar("COLLECTED", default=None)  # messages of this thread


def show(*lines: object, to_stderr: bool = False) -> None:
    """Print lines above progress bars, with control characters escaped, or collect them (:func:`collect_messages`)."""
    message, collected = ("\n".join(map(printable, lines)), to_stderr), COLLECTED.get()
    if collected is None:
        show_collected([message])
    else:
        collected.append(message)


@contextlib.contextmanager
def collect_messages(messages: list[Message]) -> Iterator[None]:
    """Add messages of this thread to a list within the context, instead of printing them."""
    token = COLLECTED.set(messages)
    try:
        yield
    finally:
        COLLECTED.reset(token)


def show_collected(messages: list[Message]) -> None:
    """Print messages of :func:`collect_messages`."""
    for text, to_stderr in messages:
        with OUTPUT:
            file = sys.stderr if to_stderr else sys.stdout
            tqdm.write(text, file=file)
            file.flush()


def warn(message: str) -> None:
    """Print a warning to stderr, above progress bars, unless it exceeds a :class:`WarningLimit`."""
    if LIMITS:
        LIMITS[-1].left -= 1
        if LIMITS[-1].left < 0:
            return
        message += "; further warnings are suppressed" * (LIMITS[-1].left == 0)
    show(f"WARNING: {one_line(message)}", to_stderr=True)


class WarningLimit(contextlib.AbstractContextManager["WarningLimit"]):
    """Limit on the number of warnings that are printed within the context. The innermost limit applies."""

    def __init__(self, maximum: int) -> None:
        self.left = maximum

    def __enter__(self) -> "WarningLimit":
        LIMITS.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        LIMITS.pop()


LIMITS: list[WarningLimit] = []


def progress_bar(items: Iterable[T] | None, label: str, unit: str, hidden: bool = False, **options: Any) -> "tqdm[T]":
    """Return tqdm's progress bar. It is visible only on a terminal, and disappears when it is complete."""
    return tqdm(items, printable(label), leave=False, disable=hidden or None, unit=unit, **options)


def printable(text: object) -> str:
    """Escape control characters, which a terminal would interpret, in text of unknown origin."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def one_line(message: object) -> str:
    """Return a message as one line of limited length, since it may quote a hostile file."""
    text = printable(message)
    return text if len(text) <= 1000 else f"{text[:500]} ... {text[-495:]}"


# ------------------------------------------------------------------- errors and interrupts


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: with status 0, with 1 and an error in one line, or with 128 + the number of a signal."""
    for name in ("stdout", "stderr"):
        if not getattr(sys, name):  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # the terminal may not support all characters
    status, message = 0, ""
    try:
        with handle_signals(TERMINATION_SIGNALS, interrupt), flush_denormal():
            main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head or less, has ended
        if isinstance(sys.stdout, io.TextIOWrapper):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (CommandError, OSError, MemoryError, RuntimeError) as error:
        status, message = 1, f"error: {describe_error(error)}\n"
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        status, message = 128 + number, "interrupted\n"
    with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
        sys.stderr.write(message)  # in one call, since other processes may write to the same terminal
    sys.exit(status)


def describe_error(error: Exception) -> str:
    """Return one line for the user. Raise the error again if it is a bug."""
    if isinstance(error, CommandError | OSError):
        return one_line(error)
    if is_out_of_memory(error):
        return "out of memory; use a smaller --batch-size, --patch-size or --tile, or a smaller image"
    if isinstance(error, RuntimeError) and any(reason in str(error) for reason in OUT_OF_THREADS):
        return "cannot start another thread; end other programs, or set OMP_NUM_THREADS=1"
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the CPU or a GPU ran out of memory.

    Without memory for its workspace, cuDNN says that it found no engine, and cuBLAS fails to initialize. oneDNN says
    that it could not create something.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in OUT_OF_MEMORY)


def plural(number: int, noun: str) -> str:
    """Return for example "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals within the context, except for signals that are ignored, such as SIGHUP under nohup."""
    handled = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    """Flush denormals, numbers very close to zero, to zero: with them a hostile network could be forty times slower."""
    before = not torch.full((1,), 1e-39).mul(1).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)  # a notebook keeps running


# -------------------------------------------------------------------------------- files


class FileWithoutDescriptor(io.BufferedRandom):
    """A file without a descriptor, since Pillow would write to it directly and miss that a disk is full.

    Writing fails once ``stop`` is set, since a signal interrupts only the main thread.
    """

    def __init__(self, raw: io.FileIO, stop: Event | None = None) -> None:
        super().__init__(raw)
        self.stop = stop

    def write(self, data: Any) -> int:
        if self.stop and self.stop.is_set():
            raise CommandError("interrupted")
        return super().write(data)

    def fileno(self) -> NoReturn:
        raise io.UnsupportedOperation("fileno")


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file, up to one byte more than ``max_bytes`` to show that it is larger. Raise CommandError."""
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CommandError(f"{path}: not a file")
            return file.read(max_bytes + 1)
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from error


def open_without_waiting(path: str, flags: int) -> int:
    """Open a file as open() does, but do not wait until somebody writes to it if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def atomic_write(path: Path, stop: Event | None = None) -> Iterator[FileWithoutDescriptor]:
    """Open a file that replaces ``path`` when it is complete, so that no reader ever finds half a file.

    Raise CommandError if it cannot be written, or if another thread sets ``stop``.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = create_temporary_file(path, stack)
            file = stack.enter_context(FileWithoutDescriptor(raw, stop))
            yield file
            file.flush()
            os.fsync(raw.fileno())
            file.close()  # since Windows does not rename an open file
            os.replace(raw.name, path)
            sync_folder(path.parent)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error


def create_temporary_file(path: Path, stack: contextlib.ExitStack) -> io.FileIO:
    """Create a file beside ``path``, locked and deleted by ``stack``.

    Its name is random, since processes in two containers may have the same ID. Until it is locked, another
    process may remove it as stale; then the next attempt may succeed.
    """
    attempts = 0
    while True:
        # In UTF-8, its name has up to 141 bytes. Encrypted home folders allow 143, other file systems 255.
        temporary = path.with_name(f".{path.name[:28]}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
        try:
            with contextlib.ExitStack() as attempt:
                raw = io.FileIO(temporary, "x+")
                attempt.callback(delete, raw)
                attempt.enter_context(locked(temporary))
                stack.push(attempt.pop_all())
                return raw
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            attempts += 1
            if attempts == 100:
                raise


def delete(file: io.FileIO) -> None:
    """Close and delete a file, unless it has been renamed."""
    file.close()
    with contextlib.suppress(OSError):
        os.unlink(file.name)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power failure. Windows and some network drives cannot do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder, and yield whether that is possible: Windows and some network drives have no locks.

    Raise BlockingIOError if another process has locked it, or FileNotFoundError if it has been removed in the meantime.
    """
    if not fcntl:
        yield False
        return
    descriptor, supported = os.open(path, os.O_RDONLY | os.O_NONBLOCK), True  # a pipe would block
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            supported = False
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "replaced by another process", str(path))
        yield supported
    finally:
        os.close(descriptor)


def remove_stale_files(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left. Locked ones are in use and stay."""
    for stale in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError), locked(stale) as supported:
            if supported:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they do not exist. Raise CommandError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create folder {folder}: {error.strerror}") from error
