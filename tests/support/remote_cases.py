"""A real S3 server for tests, and a proxy before it that counts, delays, refuses and breaks off."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from crash_harness import PROCESSES
from store_cases import Case, crash_case

from cosettle_cache.store import FeatureStore, open_store

BUCKET = "bucket"

#: What obstore reads; the keys are any, the server does not check them unless it is told to.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


def start(task: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start `task` in a process of its own, with this one's environment."""
    process = PROCESSES.Process(target=_run, args=(dict(os.environ), task, arguments))
    process.start()
    return process


def _run(environment: dict[str, str], task: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    task(*arguments)


def unpickle_and_read(pickled: bytes) -> None:
    check_samples(crash_case(), pickle.loads(pickled))


def write_store(url: str) -> None:
    crash_case().write(url)


def read_through_cache(url: str, folder: Path, limit: int) -> None:
    check_samples(crash_case(), open_store(url, cache_dir=folder, cache_bytes=limit))


def check_samples(case: Case, store: FeatureStore) -> None:
    """Compare all samples that the store shows."""
    ids = store.sample_ids
    assert np.array_equal(store.samples(ids), samples_of(case)[ids])


def samples_of(case: Case) -> np.ndarray:
    """Return the samples of a whole pairs store."""
    tokens = case.array(case.plan.arrays[0].grid)
    return tokens.reshape(-1, 3, *tokens.shape[1:])


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Server:
    """One server process; its objects live in its memory."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **environment: str) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)
        for _ in range(6000):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            time.sleep(0.05)
        raise RuntimeError("the S3 server did not start")

    def make_bucket(self, name: str = BUCKET) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=120).close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Yield a server with a bucket, the environment pointing to it."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto, the S3 server of the tests, is not installed")
    server = Server(free_port())
    try:
        server.start()
        server.make_bucket()
        with variables(**CREDENTIALS, AWS_ENDPOINT_URL=server.endpoint):
            yield server
    finally:
        server.stop()


@dataclass
class Proxy:
    """Passes requests on to a server and notes them; delays, refuses or breaks off as the test asks."""

    server: Server
    port: int = field(default_factory=free_port)
    latency_s: float = 0.0
    requests: list[str] = field(default_factory=list)
    #: So many requests from now on are answered with a status of failure, so many answers break off.
    n_refused: int = 0
    refusal: int = 503
    n_broken: int = 0
    #: What it does to every object whose name ends in `faulty`.
    fault: str = ""
    faulty: str = ""
    n_at_once: int = 0
    most_at_once: int = 0
    listener: ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def n_bytes(self) -> int:
        """Bytes of all ranges asked for, those from the end not counted."""
        ranges = [request.partition("bytes=")[2].split("-") for request in self.requests]
        return sum(int(pair[1]) - int(pair[0]) + 1 for pair in ranges if len(pair) == 2 and pair[0])

    def clear(self) -> None:
        self.requests.clear()
        self.most_at_once = 0

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.listener = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.listener.daemon_threads = True
        serve = Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        serve.start()

    def stop(self) -> None:
        """Refuse connections, and hang up on those that are open."""
        if self.listener is not None:
            listener, self.listener = self.listener, None
            listener.shutdown()
            listener.socket.close()


@contextlib.contextmanager
def running_proxy(server: Server, latency_s: float = 0.0) -> Iterator[Proxy]:
    """Yield a proxy, the environment pointing to it."""
    proxy = Proxy(server, latency_s=latency_s)
    proxy.start()
    try:
        with variables(AWS_ENDPOINT_URL=proxy.endpoint):
            yield proxy
    finally:
        proxy.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.server.port, timeout=30)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def pass_on(self) -> None:
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix(f"/{BUCKET}/")
        proxy.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        proxy.n_at_once += 1
        proxy.most_at_once = max(proxy.most_at_once, proxy.n_at_once)
        try:
            time.sleep(proxy.latency_s)
            if proxy.listener is None:
                self.close_connection = True
            elif proxy.n_refused > 0:
                proxy.n_refused -= 1
                self.send_error(proxy.refusal)
            else:
                self.answer(body)
        finally:
            proxy.n_at_once -= 1

    def answer(self, body: bytes) -> None:
        fault = (
            self.proxy.fault
            if self.command in ("GET", "HEAD") and self.path.endswith(self.proxy.faulty)
            else ""
        )
        if fault == "answers 404":
            self.send_error(404)
            return
        if fault == "ignores ranges":
            del self.headers["Range"]
        self.upstream.request(self.command, self.path, body, dict(self.headers))
        response = self.upstream.getresponse()
        data = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        if fault == "truncates bodies":
            data = data[: len(data) // 2]
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.proxy.n_broken > 0 and len(data) > 100:
            self.proxy.n_broken -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def log_message(self, format: str, *args: object) -> None:
        return
