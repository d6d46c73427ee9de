import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line

import utils
from utils import CommandError, atomic_write, deferred_interrupts, run_command

# ------------------------------------------------------------------- errors and interrupts


def test_text_from_elsewhere_cannot_steer_the_terminal(capsys):
    assert utils.printable("a\x1b[31m\nb\u202e é") == "a\\x1b[31m\\nb\\u202e é"
    utils.warn("a\x1b[31m\nb")
    assert capsys.readouterr() == ("", "WARNING: a\\x1b[31m\\nb\n")


@pytest.mark.parametrize(
    ("problem", "status", "message"),
    [
        (CommandError("no such\nthing"), 1, "error: no such\\nthing"),
        (FileNotFoundError(2, "No such file", "a\x1b"), 1, "error: [Errno 2] No such file: "),
        (MemoryError(), 1, "error: out of memory; use a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: out of memory; use a smaller"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_is_one_line(capsys, problem, status, message):
    def main():
        raise problem

    with pytest.raises(SystemExit) as end:
        run_command(main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (status, "")
    assert err.startswith(message)
    assert_one_line(err)


def test_our_own_mistakes_keep_their_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(main)


@pytest.mark.parametrize(
    ("error", "lacks_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_told_from_other_errors(error, lacks_memory):
    assert utils.is_out_of_memory(error) is lacks_memory


@pytest.mark.parametrize(
    ("shell", "out", "err"),
    [
        ("{} >&-", "", r"\xe9 \udcff"),
        ("{} 2>&-", r"\xe9 \udcff", ""),
        ("({}; echo status $? >&3) 3>&2 | true", "", r"\xe9 \udcff" + "\nstatus 1"),
    ],
    ids=["stdout is closed", "stderr is closed", "nobody reads"],
)
def test_any_kind_of_output_will_do(shell, out, err):
    """Even one that cannot show all characters."""
    code = (
        "import sys, utils; utils.run_command(lambda: [print('é \\udcff', file=f) for f in (sys.stderr, sys.stdout)])"
    )
    command = ["sh", "-c", shell.format(f'{sys.executable} -c "{code}"')]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    end = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1200)
    assert (end.returncode, end.stdout.strip(), end.stderr.strip()) == (0, out, err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_without_leaving_a_half_written_file(capsys, number, status):
    def main():
        with atomic_write(Path("file")) as file:
            file.write(b"half")
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert (end.value.code, capsys.readouterr().err, os.listdir()) == (status, "interrupted\n", [])
    assert signal.getsignal(number) == signal.SIG_DFL


def test_under_nohup_commands_and_trainings_go_on(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with utils.handle_signals([signal.SIGHUP], utils.interrupt), deferred_interrupts() as raise_deferred:
            signal.raise_signal(signal.SIGHUP)
            raise_deferred()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_deferred_and_a_second_ctrl_c_is_not(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, *utils.TERMINATION_SIGNALS)]
    with deferred_interrupts() as raise_deferred:
        raise_deferred()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt, match=str(int(number))):
            raise_deferred()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, *utils.TERMINATION_SIGNALS)] == before


# -------------------------------------------------------------------------------- files


def test_a_file_is_replaced_when_it_is_complete_and_never_written_over(monkeypatch):
    """Whoever holds the old file, here by a second link, keeps it whole."""
    path, link = Path("file"), Path("link")
    path.write_bytes(b"the first")
    os.link(path, link)
    with atomic_write(path) as file:
        file.write(b"the next")
        assert path.read_bytes() == b"the first"
    assert (path.read_bytes(), link.read_bytes()) == (b"the next", b"the first")

    def disk_full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(CommandError, match=r"^cannot write file: No space left on device$"), atomic_write(path) as file:
        file.write(b"half of another")
    assert path.read_bytes() == b"the next"
    assert sorted(os.listdir()) == ["file", "link"]


def test_a_name_may_be_as_long_as_the_file_system_allows():
    name = 63 * "\N{GRINNING FACE}" + "abc"
    assert len(name.encode()) == 255
    with atomic_write(Path(name)) as file:
        file.write(b"content")
    assert os.listdir() == [name]


def test_what_killed_processes_left_is_swept_and_what_is_in_use_stays(monkeypatch):
    for name in (f".a.1{utils.PART}", ".b.part", f"c{utils.PART}"):
        Path(name).touch()
    Path(".set-1").mkdir()
    Path(".set-1/file").touch()
    os.mkfifo(f".pipe{utils.PART}")
    with atomic_write(Path("d")) as file:
        utils.remove_stale_files(Path())
        assert sorted(os.listdir()) == [".b.part", f".d.{os.getpid()}{utils.PART}", ".set-1", f"c{utils.PART}"]
        file.write(b"content")
    assert Path("d").read_bytes() == b"content"
    with utils.locked(Path(".set-1")):
        utils.remove_stale_files(Path(), ".set-*")
        assert Path(".set-1/file").exists()
    utils.remove_stale_files(Path(), ".set-*")
    assert not Path(".set-1").exists()
