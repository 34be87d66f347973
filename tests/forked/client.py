"""Python as tests start it: asks tests/forked/server.py for a process, and represents it.

`forked.make_folder` installs it as `python` and as every command. It needs only the standard
library. It forwards signals and returns the exit status, and the process is killed with it.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

SIGNALS = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT"]
LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]


def main() -> None:
    program = sys.argv[0]
    arguments = sys.argv[1:]
    if os.path.basename(program) != "python":  # a command: its script as pip has installed it
        arguments.insert(
            0, os.path.join(os.path.dirname(sys.executable), os.path.basename(program))
        )
    options = []
    while arguments and arguments[0] in ("-I", "-P", "-u"):
        options.append(arguments.pop(0))
    if not arguments or (arguments[0][0] == "-" and arguments[0] not in ("-m", "-c")):
        os.execv(sys.executable, [sys.executable, *options, *arguments])
    received: list[int] = []
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for name in SIGNALS:
        signal.signal(getattr(signal, name), lambda number, _: received.append(number))
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    descriptors = [number for number in descriptors if _is_inherited(number)]
    request = {
        "arguments": arguments,
        "options": options,
        "executable": os.path.join(os.path.dirname(program), "python"),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": os.umask(0),
        "ignored": [name for name, handler in before.items() if handler == signal.SIG_IGN],
        "blocked": sorted(blocked),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
        "descriptors": descriptors,
    }
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(os.path.dirname(os.path.dirname(program)), "socket"))
    body = json.dumps(request).encode()
    socket.send_fds(server, [len(body).to_bytes(8, "big")], descriptors)
    server.sendall(body)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in descriptors:
        os.dup2(nothing, number) if number < 3 else os.close(number)
    answers = server.makefile("r")
    pid = int(answers.readline() or 0)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    if pid:
        for name in SIGNALS:
            signal.signal(getattr(signal, name), forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in received:
            forward(number, None)
    status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_inherited(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:  # the one of the listing itself, now closed
        return False


main()
