import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, in_new_process

import utils
from utils import TEMPORARY_SUFFIX, CommandError, WarningLimit, atomic_write, locked, remove_stale_files, warn

# ------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 3", "unrecognized arguments: --epochs 3; did you mean --num-epoch? (see x --help)"),
        ("--batchsize=3", "unrecognized arguments: --batchsize=3; did you mean --batch-size? (see x --help)"),
        ("--num_epoch 1 --lrs", "unrecognized arguments: --num_epoch 1 --lrs; did you mean --num-epoch?; did you mean"),
        ("--seed 3", "unrecognized arguments: --seed 3; it is fixed at the start (see x --help)"),
        ("--recipe=a -3 b", "unrecognized arguments: --recipe=a -3 b (see x --help)"),  # unlike --precision
        ("--" + "é\n" * 99, "unrecognized arguments: --é\\né\\n"),
    ],
)
def test_unknown_option_is_reported_with_the_most_similar_one(capsys, arguments, message):
    parser = utils.ArgumentParser(prog="x", hints={"--seed": "it is fixed at the start"})
    for name in ("--num-epoch", "--batch-size", "--lr", "--save-freq", "--precision"):
        parser.add_argument(name)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments.split(" "))
    err = capsys.readouterr().err
    assert (end.value.code, err[: err.index(": ", 3)]) == (2, "x: error")
    assert_one_line(err, f"x: error: {message}")


# --------------------------------------------------------------------------------- output


def test_collected_messages_of_a_thread_are_printed_at_their_turn(capsys):
    messages = []
    with utils.collect_messages(messages):
        utils.show("result", "of two lines")
        warn("late")
        other = threading.Thread(target=warn, args=["at once"])
        other.start()
        other.join()
        assert capsys.readouterr() == ("", "WARNING: at once\n")
    warn("outside")
    assert capsys.readouterr() == ("", "WARNING: outside\n")
    utils.show_collected(messages)
    assert capsys.readouterr() == ("result\nof two lines\n", "WARNING: late\n")


# ------------------------------------------------------------------- errors and interrupts


def test_control_characters_are_escaped(capsys):
    assert utils.printable("a\x1b[31m\nb\u202e é") == "a\\x1b[31m\\nb\\u202e é"
    utils.warn("a\x1b[31m\nb")
    assert capsys.readouterr() == ("", "WARNING: a\\x1b[31m\\nb\n")
    utils.show("a\x1b[31m\nb", Path("\r"))
    assert capsys.readouterr() == ("a\\x1b[31m\\nb\n\\r\n", "")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert list(utils.progress_bar([7], "a\x1b[31m\nb", "B", file=terminal)) == [7]
    assert terminal.getvalue().startswith("\ra\\x1b[31m\\nb:")


def test_long_message_is_shortened(capsys):
    with pytest.raises(SystemExit):
        utils.run_command(partial(fail, CommandError("[" + "9, " * 300_000 + "]")))
    err = capsys.readouterr().err
    assert_one_line(err, "error: [9, 9,", " ... ", "9, ]")
    assert len(err) < 1020


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("problem", "status", "message"),
    [
        (CommandError("no such\nthing"), 1, "error: no such\\nthing"),
        (FileNotFoundError(2, "No such file", "a\x1b"), 1, "error: [Errno 2] No such file: "),
        (MemoryError(), 1, "error: out of memory; use a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: out of memory; use a smaller"),
        (RuntimeError("can't start new thread"), 1, "error: cannot start another thread; "),
        (RuntimeError("Resource temporarily unavailable"), 1, "error: cannot start another thread; "),
        (BlockingIOError(11, "Resource temporarily unavailable"), 1, "error: [Errno 11] Resource temporarily"),
        (OSError(12, "Cannot allocate memory"), 1, "error: [Errno 12] Cannot allocate memory"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failure_is_reported_in_one_line(capsys, problem, status, message):
    def main():
        raise problem

    with pytest.raises(SystemExit) as end:
        utils.run_command(main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (status, "")
    assert err.startswith(message)
    assert_one_line(err)


def count_denormal_numbers():
    """Return how many remain in a command, in operations that use one and all threads."""
    found = []
    with contextlib.suppress(SystemExit):
        sizes = (10, 10**6)
        utils.run_command(lambda: found.extend((torch.full((n,), 1e-39) * 1).count_nonzero().item() for n in sizes))
    return found


def test_commands_compute_without_denormal_numbers():
    assert in_new_process(count_denormal_numbers) == [0, 0]


class NotebookStream:
    """The least that a notebook has in place of stdout: neither a descriptor nor an encoding to configure."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (CommandError("no"), 1, "error: no\n"),
        (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("flushes", [False, True])
def test_command_runs_in_a_notebook_and_leaves_it_as_it_was(monkeypatch, error, status, message, flushes):
    def main():
        utils.show("result")
        list(utils.progress_bar([1], "images", "B"))
        if error:
            raise error

    streams = {"stdout": NotebookStream(), "stderr": NotebookStream()}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    torch.set_flush_denormal(flushes)
    handlers = [signal.getsignal(number) for number in utils.TERMINATION_SIGNALS]
    with pytest.raises(SystemExit) as end:
        utils.run_command(main)
    assert (end.value.code, streams["stdout"].text) == (status, "result\n")
    assert streams["stderr"].text.rpartition("\r")[2] == message  # after the progress bar
    assert {name: getattr(sys, name) for name in streams} == streams
    assert [signal.getsignal(number) for number in utils.TERMINATION_SIGNALS] == handlers
    assert (torch.full((1,), 1e-39) * 1).count_nonzero().item() == 1 - flushes


def test_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        utils.run_command(main)


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("can't start new thread"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_lack_of_memory_is_recognized(error, out_of_memory):
    assert utils.is_out_of_memory(error) is out_of_memory


@pytest.mark.parametrize(
    ("shell", "out", "err"),
    [
        ("{} >&-", "", r"\xe9 \udcff"),
        ("{} 2>&-", r"\xe9 \udcff", ""),
        ("({}; echo status $? >&3) 3>&2 | true", "", r"\xe9 \udcff" + "\nstatus 1"),
    ],
    ids=["stdout is closed", "stderr is closed", "pipe is closed"],
)
def test_command_prints_to_limited_outputs(shell, out, err):
    """The outputs may also lack characters."""
    script = ROOT / "tests" / "scripts" / "print_unusual_characters.py"
    command = ["sh", "-c", shell.format(f'"{sys.executable}" "{script}"')]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    end = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert (end.returncode, end.stdout.strip(), end.stderr.strip()) == (0, out, err)


@pytest.mark.usefixtures("_default_signal_handlers")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_leaves_no_temporary_file(capsys, number, status):
    def main():
        with atomic_write(Path("file")) as file:
            file.write(b"half")
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as end:
        utils.run_command(main)
    assert (end.value.code, capsys.readouterr().err, os.listdir()) == (status, "interrupted\n", [])
    assert signal.getsignal(number) == signal.SIG_DFL


# -------------------------------------------------------------------------------- files


def test_file_is_replaced_and_not_overwritten():
    """A second link to the old file keeps its content."""
    path, link = Path("file"), Path("link")
    path.write_bytes(b"old")
    os.link(path, link)
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), link.read_bytes()) == (b"new", b"old")


def test_stopped_write_keeps_existing_file():
    Path("file").write_bytes(b"old")
    stop = threading.Event()

    def write():
        with atomic_write(Path("file"), stop) as file:
            file.write(b"half")
            stop.set()
            file.write(b"the rest")

    with pytest.raises(CommandError, match=r"^interrupted$"):
        write()
    assert os.listdir() == ["file"]
    assert Path("file").read_bytes() == b"old"


def test_full_disk_keeps_existing_file(monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    Path("file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CommandError, match=r"^cannot write file: No space left"), atomic_write(Path("file")) as file:
        file.write(b"half")
    assert os.listdir() == ["file"]
    assert Path("file").read_bytes() == b"old"


def test_file_name_may_have_the_maximum_length():
    name = 63 * "\N{GRINNING FACE}" + "abc"
    assert len(name.encode()) == 255
    with atomic_write(Path(name)) as file:
        file.write(b"content")
        assert [len(temporary) <= 143 for temporary in os.listdir(b".")] == [True]  # as encrypted folders allow
    assert os.listdir() == [name]


def test_two_writers_of_one_file_do_not_disturb_each_other():
    """They may have the same process number, in two containers."""
    path = Path("file")
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert (path.read_bytes(), os.listdir()) == (b"first", ["file"])


def test_temporary_file_never_replaces_or_follows_what_exists(monkeypatch):
    names = iter("aabbc")
    monkeypatch.setattr(utils.secrets, "token_hex", lambda size: next(names))
    Path("other").write_bytes(b"other")
    os.symlink("other", f".file.b{TEMPORARY_SUFFIX}")
    with atomic_write(Path("file")) as first:
        first.write(b"first")
        with atomic_write(Path("file")) as second:
            second.write(b"second")
    assert Path("file").read_bytes() == b"first"
    assert Path("other").read_bytes() == b"other"
    assert os.path.islink(f".file.b{TEMPORARY_SUFFIX}")


@pytest.mark.parametrize("replaced", [False, True])
def test_file_that_is_removed_before_it_is_locked_is_created_again(monkeypatch, replaced):
    """The process that removes stale files may be between any two system calls."""
    flock, calls = utils.fcntl.flock, []

    def remove_first(descriptor, operation):
        if not calls:
            (name,) = os.listdir()
            os.unlink(name)
            if replaced:
                Path("another").touch()
                os.rename("another", name)
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(utils.fcntl, "flock", remove_first)
    with atomic_write(Path("file")) as file:
        remove_stale_files(Path())
        file.write(b"content")
    assert Path("file").read_bytes() == b"content"
    assert len(calls) > 1


def test_file_that_another_process_is_removing_is_created_again(monkeypatch):
    locks = []

    def locked_by_other(path):
        if not locks:
            locks.append(os.open(path, os.O_RDONLY))
            utils.fcntl.flock(locks[0], utils.fcntl.LOCK_EX)
        return locked(path)

    monkeypatch.setattr(utils, "locked", locked_by_other)
    with atomic_write(Path("file")) as file:
        file.write(b"content")
    os.close(locks[0])
    assert (Path("file").read_bytes(), os.listdir()) == (b"content", ["file"])


def test_file_has_the_permissions_of_a_new_file():
    previous = os.umask(0o027)
    try:
        with atomic_write(Path("file")) as file:
            file.write(b"content")
    finally:
        os.umask(previous)
    assert Path("file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("syncs_folders", [True, False], ids=["local disk", "network drive"])
def test_file_is_synced_before_it_is_renamed_and_its_folder_after(monkeypatch, syncs_folders):
    calls, replace = [], os.replace

    def fsync(descriptor):
        folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        calls.append("sync folder" if folder else f"sync {os.fstat(descriptor).st_size} bytes")
        if folder and not syncs_folders:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    with atomic_write(Path("file")) as file:
        file.write(b"content")
    assert calls == ["sync 7 bytes", "rename", "sync folder"]
    assert Path("file").read_bytes() == b"content"


def test_missing_folder_is_named():
    with pytest.raises(CommandError, match=r"^cannot write no/file: No such file"), atomic_write(Path("no/file")):
        pass


def test_file_names_need_not_be_utf8(capsys):
    name = os.fsdecode(b"\xff.bmp")
    with atomic_write(Path(name)) as file:
        Path(f".{name}{TEMPORARY_SUFFIX}").touch()
        remove_stale_files(Path())
        file.write(b"content")
    assert os.listdir(b".") == [b"\xff.bmp"]
    utils.warn(name)
    assert capsys.readouterr().err == "WARNING: \\udcff.bmp\n"


def test_stale_files_are_removed():
    for name in (f".a.1{TEMPORARY_SUFFIX}", ".b.part", f"c{TEMPORARY_SUFFIX}"):
        Path(name).touch()
    os.mkfifo(f".pipe{TEMPORARY_SUFFIX}")
    remove_stale_files(Path())
    assert sorted(os.listdir()) == [".b.part", f"c{TEMPORARY_SUFFIX}"]


def test_file_in_use_is_not_removed():
    with atomic_write(Path("file")) as file:
        remove_stale_files(Path())
        file.write(b"content")
    assert Path("file").read_bytes() == b"content"


def test_stale_folder_is_removed_unless_in_use():
    folder = Path(f".set-1{TEMPORARY_SUFFIX}")
    folder.mkdir()
    Path(folder, "file").touch()
    with locked(folder):
        remove_stale_files(Path())
        assert Path(folder, "file").exists()
    remove_stale_files(Path())
    assert not folder.exists()


def test_warnings_are_limited_within_the_context_only(capfd):
    limit = WarningLimit(2)
    for text in "abc":
        with limit:
            with WarningLimit(0):
                warn("x")
            warn(text)
    warn("d")
    err = capfd.readouterr().err
    assert err == "WARNING: a\nWARNING: b; further warnings are suppressed\nWARNING: d\n"
