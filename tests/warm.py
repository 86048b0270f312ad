"""Processes that begin behind their imports: forks of one that has imported everything.

A script imports for five to ten seconds, and in a test it then works for one. Here a server
imports once. It forks for each start, and the fork takes over folder, environment and streams and
runs the script as `python script.py` does: signals, exit status, what it does at exit are its own.

That is sound because the server has no thread and computes nothing. What a library reads from the
environment when it is imported (HF_ENDPOINT) is the tests' own: a test of that starts Python.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
# And what the scripts import only when they need it. Not wandb: it makes a folder when it is
# imported, and the first fork that ends would delete it.
LIBRARIES = ["requests", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "psutil"]
_NUMBER = struct.Struct("i")
_channels: list[socket.socket] = []  # to the server of this process, once it is started


class Process:
    """A fork, with the methods of subprocess.Popen that tests use."""

    def __init__(self, command: list[str], report: int):
        self.args, self._report = command, report
        self.returncode: int | None = None
        (self.pid,) = _NUMBER.unpack(os.read(report, _NUMBER.size))

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if (code := self._look(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            (self.returncode,) = _NUMBER.unpack(os.read(self._report, _NUMBER.size))
            os.close(self._report)
        return self.returncode


def start(
    command: list[str],
    folder: Path,
    stdout: IO,
    stderr: IO,
    stdin: IO | None = None,
    measured: bool = False,
    **environment,
) -> Process:
    """What `python script.py …` or `python -c …` starts, in a session of its own.

    measured: by coverage, where the tests are. It would hang for ever where a signal raises an
        error while it holds its lock.
    """
    command = list(map(str, command))
    request = {
        "command": command,
        "folder": str(folder),
        "measured": measured,
        "environment": os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    }
    reader, writer = os.pipe()
    with open(os.devnull) as nothing:
        streams = [(stream or nothing).fileno() for stream in (stdin, stdout, stderr)]
        socket.send_fds(_server(), [json.dumps(request).encode()], [*streams, writer])
    os.close(writer)
    return Process(command, reader)


def run(
    command: list[str], folder: Path, typed: str = "", timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Wait for the end of a start. What it printed is text.

    Raises:
        subprocess.TimeoutExpired: it was ended.
    """
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(typed.encode())
        streams[0].seek(0)
        stdin, stdout, stderr = streams
        process = start(command, folder, stdout, stderr, stdin, measured=True, **environment)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for stream in streams:
            stream.seek(0)
        printed = [stream.read().decode() for stream in streams[1:]]
    return subprocess.CompletedProcess(process.args, code, *printed)


def end():
    """End the server of this test process, and wait until it is gone."""
    for channel in _channels:
        channel.shutdown(socket.SHUT_WR)
        channel.recv(1)
        channel.close()
    _channels.clear()


def _server() -> socket.socket:
    """The channel to the server, which is started where there is none yet."""
    if not _channels:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        # It leaves the tests' process at once: no test finds a child that is not its own.
        subprocess.run(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )
        theirs.close()
        _channels.append(ours)
    return _channels[0]


# --- in the server ------------------------------------------------------------------------------


def serve(channel: socket.socket):
    """Fork for each request until the tests end. Returns in a fork, which is to run its main."""
    while True:
        message, files, *_ = socket.recv_fds(channel, 2**20, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            channel.close()
            _watch(json.loads(message), files)
            return
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(request: dict, files: list[int]):
    """Fork once more, and report process id and exit status of that fork, in which it returns."""
    *streams, report = files
    process = os.fork()
    if process == 0:
        os.close(report)
        _take_over(request, streams)
        return
    try:
        for stream in streams:
            os.close(stream)
        os.write(report, _NUMBER.pack(process))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.write(report, _NUMBER.pack(status))
    finally:
        os.kill(os.getpid(), signal.SIGKILL)  # it has nothing to do at exit


def _take_over(request: dict, streams: list[int]):
    """Become what Python is at its start, but for what is imported."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin, sys.stdout, sys.stderr = map(_open_stream, range(3))
    if not request["measured"] and (coverage := _coverage()):
        coverage.stop()
    sys.orig_argv = request["command"]
    sys.argv = request["command"][1:]


def _coverage():
    """What measures this process, if anything does."""
    return sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None


def _open_stream(number: int) -> IO:
    """As Python opens standard input, output and error."""
    errors = "backslashreplace" if number == 2 else "strict"
    return os.fdopen(
        number,
        "w" if number else "r",
        buffering=1 if number == 2 else -1,
        encoding=os.environ["PYTHONIOENCODING"],
        errors=errors,
        closefd=False,
    )


def run_main() -> int:
    """Run sys.argv as Python's own main module. The exit status of what ends as it should."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if sys.argv[0] == "-c":
        sys.path[0], name, source = "", "<string>", sys.argv.pop(1)
    else:
        name = main.__file__ = sys.argv[0]
        sys.path[0], source = str(Path(name).parent), Path(name).read_text(encoding="utf-8")
    try:
        exec(compile(source, name, "exec"), vars(main))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    return 0


def leave(status: list[int]):
    """The last thing at exit: not to take apart what was imported, which takes a second."""
    if status:
        if coverage := _coverage():  # it would save what it measured behind this
            coverage.stop()
            coverage.save()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    status: list[int] = []
    atexit.register(leave, status)  # the first one is called last
    sys.path[0] = str(ROOT)
    for name in [*LIBRARIES, *(path.stem for path in ROOT.glob("*.py"))]:
        importlib.import_module(name)
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    status.append(run_main())
