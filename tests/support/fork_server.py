"""Runs scripts in processes that are forks of one which has imported torch, DeepSpeed and the frameworks.

To import them takes longer than what most ranks do. A script has its own environment, working folder, `__main__` and
exit functions, as in a fresh process; the modules are not taken down at its end. What a test says of imports, of the
start or of the end of an interpreter needs a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "FORK_SERVER"  # where the socket of the server lies
CLIENT = Path(__file__).with_name("fork_client.py")
_IMPORTED = ("torch", "torch._dynamo", "deepspeed", "transformers.trainer", "accelerate", "lightning")
_LONGEST_REQUEST = 1 << 20


def command() -> list[str]:
    """Returns what takes the place of `sys.executable` in a command that runs a script, or -c and code.

    With a GPU that is what it is: what is imported for one starts threads, which no fork has.
    """
    if os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        return [sys.executable]
    if VARIABLE not in os.environ:
        start()
    return [sys.executable, "-ISs", str(CLIENT), os.environ[VARIABLE]]


def start() -> None:
    """Starts a server that ends with this process; it imports nothing before it is asked."""
    folder = tempfile.mkdtemp(prefix="forks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, "-c", "import fork_server; fork_server.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CLIENT.parent), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    server.stdout.readline()  # it listens
    atexit.register(server.communicate)


def serve() -> None:
    """Forks for whoever connects, until standard input ends; runs the script in the fork."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.environ.pop(VARIABLE))
        listening.listen(100)
        os.write(1, b"ready\n")
        os.dup2(2, 1)
        os.set_blocking(0, True)
        for client in _clients(listening):
            _import()
            if os.fork() == 0:
                listening.close()
                _end(_run, **_forked(client))
            client.close()
    _end(dict)


def _end(function: Callable[..., Any], **arguments: Any) -> NoReturn:
    """Calls a function and ends as an interpreter does, except that it leaves the modules as they are."""
    code = 1
    try:
        function(**arguments)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _clients(listening: socket.socket) -> Iterator[socket.socket]:
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            return
        yield listening.accept()[0]


def _import() -> None:
    if _IMPORTED[0] in sys.modules:
        return
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError("an import has started a thread, which no fork would have")
    gc.collect()
    gc.freeze()  # no fork looks through what it has not made


def _forked(client: socket.socket) -> dict[str, Any]:
    """Forks again; returns what to run in the child; the parent tells the client of the child's end, and ends."""
    message, streams, _, _ = socket.recv_fds(client, _LONGEST_REQUEST, 3)
    while not message.endswith(b"\n"):
        message += client.recv(_LONGEST_REQUEST)
    child = os.fork()
    if child == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(message)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    end = os.pidfd_open(child)
    ready, _, _ = select.select([end, client], [], [])
    if end not in ready:  # the client was killed
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    name = arguments[0]
    script = Path(folder, name)
    source, first = (arguments.pop(1), "") if name == "-c" else (script.read_bytes(), str(script.parent))
    sys.argv = arguments
    own = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [
        first,
        *filter(None, own),
        *(path for path in sys.path if path not in ("", *own, str(CLIENT.parent))),
    ]
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first:
        main.__file__ = name
    exec(compile(source, name if first else "<string>", "exec"), main.__dict__)
