"""`stu-serve` as a process, with what tests ask of it."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests import forked

SECONDS = 60
"""Timeout of everything that tests wait for."""


class ServerProcess:
    """A server at `url`, with the `lines` that it has logged."""

    def __init__(self, model, *options, port=0, open_files=None, **environment):
        command = [forked.python(), "-m", "serve.server.cli", str(model), "--port", str(port)]
        if open_files is not None:
            command = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh", *command]
        command += ["--cache-gib", "0.01", *map(str, options)]
        self.process = forked.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines = []
        self._has_started = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._has_started.wait(SECONDS), self.lines
        assert self.url, self.lines

    url = None

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "listening on " in line and self.url is None:
                self.url = json.loads(line)["message"].split()[-1]
                self._has_started.set()
        self._has_started.set()

    @property
    def address(self):
        url = httpx.URL(self.url)
        return url.host, url.port

    def replicas(self):
        """Processes of replicas."""
        return [
            forked.real(child.pid)
            for child in self.process.real.children()
            if "serve.server.replicas.process" in " ".join(child.cmdline())
        ]

    def client(self, **settings):
        # Without `verify=False`, each client would load certificates for 25 ms.
        settings = {"base_url": self.url, "timeout": SECONDS, "verify": False, **settings}
        return httpx.Client(**settings)

    def get(self, path, **settings):
        with self.client() as client:
            return client.get(path, **settings)

    def post(self, path, **settings):
        with self.client() as client:
            return client.post(path, **settings)

    def metric(self, name, **headers):
        """The value of a metric, summed over its labels."""
        text = self.get("/metrics", headers=headers).text
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith((f"{name}{{", f"{name} "))
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def pages_used(self):
        return self.metric("stu:convolution_pages_used") + self.metric("stu:attention_pages_used")

    def peak_bytes(self):
        """Peak memory of the server's own process."""
        status = Path(f"/proc/{self.process.real.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def resident_bytes(self):
        """Memory of the server's own process and of each replica."""
        processes = [self.process.real, *self.replicas()]
        return [process.memory_info().rss for process in processes]

    def stop(self):
        """Ask the server to stop; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def end(self):
        """Kill the server with everything that it started."""
        if self.process.poll() is None:
            for child in self.process.real.children(recursive=True):
                child.kill()
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


@contextmanager
def serving(model, *options, **settings):
    """A server that is killed at the end of the block."""
    server = ServerProcess(model, *options, **settings)
    try:
        yield server
    finally:
        server.end()


def eventually(holds, seconds=SECONDS):
    """Wait until `holds` returns true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


def events(response):
    """The data of server-sent events up to [DONE]."""
    found = []
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return found
        if line:
            assert line.startswith("data: "), line
            found.append(json.loads(line.removeprefix("data: ")))
    raise AssertionError(f"the stream ended without [DONE]: {found[-2:]}")
