"""New processes, forked from a server that has already imported the libraries, since importing them takes seconds.

This file imports nothing of the project, so that a script that runs in such a process imports its own modules.
"""

import multiprocessing
import os
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
LIBRARIES = ["torch", "torch.utils.tensorboard", "pytest"]


@cache
def server():
    """Start the server, one for each process of pytest, and return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    default = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    with patch.dict(os.environ, default | {"PYTHONMALLOC": "malloc"}, clear=True):  # as tests of memory need
        forkserver.ensure_running()
    return context


def in_new_process(function, *arguments):
    """Call a function of a test module in a new process, where nothing else takes memory; return its result."""
    with TemporaryDirectory() as outputs:
        options = {"mp_context": server(), "initializer": enter, "initargs": (outputs, dict(os.environ))}
        with ProcessPoolExecutor(1, **options) as executor:
            result = executor.submit(function, *arguments).result(timeout=1200)
        for number in (1, 2):
            os.write(number, Path(outputs, str(number)).read_bytes())
    return result


def run_script(script, *arguments, folder="."):
    """Run a script, or a module "-m name", as in a new interpreter; return its status, stdout and stderr."""
    return run_scripts(script, *arguments, folder=folder, environments=[{}])[0]


def run_scripts(script, *arguments, folder=".", environments):
    """Run a script in a folder in several processes at once, each with further environment variables."""
    processes = []
    with TemporaryDirectory() as outputs:
        for i, environment in enumerate(environments):
            own = Path(outputs, str(i))
            own.mkdir()
            call = (own, os.environ | environment, Path(folder).resolve(), [*map(str, (script, *arguments))])
            processes.append(server().Process(target=run_main, args=call, daemon=True))
            processes[-1].start()
        for process in processes:
            process.join(1200)
            process.kill()
        texts = [[Path(outputs, str(i), name).read_text() for name in "12"] for i in range(len(processes))]
    return [(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]


def enter(outputs, environment):
    """Write stdout and stderr to the files "1" and "2" in a folder, and set the environment, both in this process."""
    for number in (1, 2):
        os.dup2(os.open(Path(outputs, str(number)), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)


def run_main(outputs, environment, folder, arguments):
    """Run a script or module in this process, with one thread. It imports modules beside it and in the folder."""
    import torch

    enter(outputs, environment)
    sys.modules.pop(__name__)
    torch.set_num_threads(1)
    script = Path(arguments[0]).resolve()
    os.chdir(folder)
    libraries = [name for name in sys.path if Path(name) != ROOT and not Path(name).is_relative_to(ROOT / "tests")]
    if arguments[0] == "-m":
        sys.argv[:], sys.path[:] = arguments[1:], [str(folder), *libraries]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:], sys.path[:] = arguments, [str(script.parent), str(folder), *libraries]
        runpy.run_path(arguments[0], run_name="__main__")
