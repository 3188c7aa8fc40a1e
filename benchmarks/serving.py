"""Downloads from `hub-export serve` against nginx, of the same file at once.

    python -m benchmarks.serving
    python -m benchmarks.serving --architecture R152x4 --downloads 32 --json

Packs random weights of an architecture's size, starts both servers on one
tree, and has clients download the archive by its handle, each with a new
connection, as tensorflow_hub does, and with a SHA-256 of what arrives. Rounds
alternate between the servers. Prints bodies with a wrong hash or size, the
throughput of each, the median of the rounds' ratios, and the server's peak
memory (VmHWM of Linux' /proc) with one client and with all. Needs nginx
(apt-get install nginx-light). Exits with 1 if a body was wrong.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from benchmarks import memory
from bit_tf import archive, errors, handles, variants
from hub_export.nginx import nginx_configuration

__all__ = [
    "HANDLE",
    "Result",
    "Target",
    "download",
    "main",
    "make_tree",
    "measure",
    "nginx",
    "report",
    "served",
]

HANDLE = handles.Handle("benchmark", "random", 1)
_BUFFER = 2**18
# Clients in threads: hashing and receiving release the interpreter's lock.
_PROCESSES = 2


@dataclasses.dataclass(frozen=True)
class Target:
    """What is downloaded.

    Attributes:
      root: of the tree that both serve.
      size: bytes of the archive.
      sha256: of the archive.
    """

    root: pathlib.Path
    size: int
    sha256: str


@dataclasses.dataclass
class Result:
    """What was measured.

    Attributes:
      size: bytes of the archive.
      clients: at once.
      downloads: of each round and server.
      wrong: bodies that were not the archive.
      ours: bytes a second of `hub-export serve`, one a round.
      nginx: likewise.
      memory_one: peak bytes of `hub-export serve` after one client.
      memory_all: after all clients at once.
    """

    size: int
    clients: int
    downloads: int
    wrong: int = 0
    ours: list[float] = dataclasses.field(default_factory=list)
    nginx: list[float] = dataclasses.field(default_factory=list)
    memory_one: int = 0
    memory_all: int = 0

    @property
    def ratio(self) -> float:
        """The median over the rounds of ours ÷ nginx's."""
        pairs = zip(self.ours, self.nginx, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def growth(self) -> int:
        """Bytes of memory from one client to all."""
        return self.memory_all - self.memory_one


def make_tree(directory: pathlib.Path, architecture: str) -> Target:
    """A tree with one archive of random weights, made once a directory.

    `N.tar.gz` is a file, as nginx follows no links. What is packed has a
    SavedModel's files, of the right size, but is none.
    """
    import numpy as np

    from hub_export import random_weights

    root = directory / architecture
    folder = root / HANDLE.path
    description = folder / handles.ENTRY_FILE
    if not (root / handles.INDEX_FILE).is_file():
        shutil.rmtree(root, ignore_errors=True)
        folder.mkdir(parents=True)
        row = variants.architecture(architecture)
        weights = random_weights.RandomWeights(row.blocks, row.stem_width)
        model = directory / f"{architecture}-model"
        shutil.rmtree(model, ignore_errors=True)
        (model / "variables").mkdir(parents=True)
        (model / "saved_model.pb").write_bytes(bytes(2**20))
        try:
            data = model / "variables" / "variables.data-00000-of-00001"
            with open(data, "wb") as file:
                for array in weights.values():
                    np.ascontiguousarray(array).tofile(file)
            packed = folder.parent / f"1{handles.ARCHIVE_SUFFIX}"
            size, sha256 = archive.pack(model, packed)
        finally:
            shutil.rmtree(model)
        content = {
            "schema": handles.SCHEMA,
            "handle": HANDLE.at(None).path,
            "version": HANDLE.version,
            "archive": {
                "path": f"{HANDLE}{handles.ARCHIVE_SUFFIX}",
                "size": size,
                "sha256": sha256,
            },
            "files": [],
        }
        description.write_text(json.dumps(content))
        (root / handles.INDEX_FILE).write_text("{}")
    release = handles.Release.parse(description.read_bytes())
    return Target(root, release.size, release.sha256)


@contextlib.contextmanager
def served(root: os.PathLike) -> Iterator[tuple[int, int]]:
    """Runs `hub-export serve`: (port, process id)."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hub_export", "serve", os.fspath(root)),
            *("--port", "0", "--no-access-log"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit("hub-export serve did not start")
        yield int(line.rstrip().rstrip("/").rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def nginx(
    root: os.PathLike, directory: pathlib.Path, **options: str
) -> Iterator[int]:
    """Runs nginx with this package's configuration, as any user: its port.

    Args:
      root: of a static site.
      directory: for its configuration and its temporary files.
      **options: of nginx_configuration.

    Raises:
      OSError: nginx is not installed, or did not start.
    """
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise FileNotFoundError(
            "The comparison needs nginx, and there is none on the PATH. "
            "Install it: apt-get install nginx-light"
        )
    directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    block = nginx_configuration(root, listen=f"127.0.0.1:{port}", **options)
    (directory / "site.conf").write_text(block)
    temporary = "".join(
        f"{kind}_temp_path {kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = directory / "nginx.conf"
    configuration.write_text(
        # As root its workers would be nobody, who may not see the files.
        f"{'user root;' if os.geteuid() == 0 else ''}\n"
        "daemon off; worker_processes auto; pid nginx.pid;\n"
        "error_log stderr error;\n"
        "events { worker_connections 1024; }\n"
        "http { access_log off; sendfile on; tcp_nopush on;\n"
        f"{temporary} include site.conf; }}\n"
    )
    command = [program, "-p", str(directory), "-c", "nginx.conf"]
    command += ["-e", "stderr"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    if checked.returncode:
        raise OSError(f"nginx refuses its configuration: {checked.stderr}")
    process = subprocess.Popen(command)
    try:
        _await_port(port, process)
        yield port
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _await_port(port: int, process: subprocess.Popen) -> None:
    for _ in range(500):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise OSError(f"nginx did not start (exit {process.poll()})")


def download(port: int, sha256: str, size: int) -> bool:
    """Downloads the archive once: whether it was right."""
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    digest, received, head = hashlib.sha256(), 0, b""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        path = handles.with_query(f"/{HANDLE}")
        client.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in head:
            part = client.recv(4096)
            if not part:
                return False
            head += part
        head, _, rest = head.partition(b"\r\n\r\n")
        digest.update(rest)
        received = len(rest)
        while count := client.recv_into(buffer):
            digest.update(view[:count])
            received += count
    return (
        head.startswith(b"HTTP/1.1 200 ")
        and received == size
        and digest.hexdigest() == sha256
    )


def _clients(
    port: int, sha256: str, size: int, clients: int, downloads: int
) -> int:
    """Downloads in threads: how many were wrong."""
    wrong = []
    left = iter(range(downloads))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            try:
                right = download(port, sha256, size)
            except OSError:
                right = False
            if not right:
                wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


def _shares(total: int, parts: int) -> list[int]:
    return [(total + index) // parts for index in range(parts)]


def _round(
    pool: concurrent.futures.Executor,
    port: int,
    target: Target,
    clients: int,
    downloads: int,
) -> tuple[float, int]:
    """(bytes a second, how many were wrong)"""
    parts = min(clients, _PROCESSES)
    start = time.perf_counter()
    running = [
        pool.submit(_clients, port, target.sha256, target.size, some, count)
        for some, count in zip(
            _shares(clients, parts), _shares(downloads, parts), strict=True
        )
    ]
    wrong = sum(one.result() for one in running)
    seconds = time.perf_counter() - start
    return downloads * target.size / seconds, wrong


def measure(
    target: Target,
    *,
    downloads: int = 200,
    clients: int = 32,
    rounds: int = 3,
    say: Callable[[str], object] = lambda line: None,
) -> Result:
    """Measures both servers; see the module's docstring.

    Args:
      target: from `make_tree`.
      downloads: of each round and server.
      clients: at once, 2 or more.
      rounds: 1 or more.
      say: is told of the progress.
    """
    result = Result(target.size, clients, downloads)
    with (
        tempfile.TemporaryDirectory() as directory,
        nginx(target.root, pathlib.Path(directory)) as theirs,
        served(target.root) as (ours, process),
        concurrent.futures.ProcessPoolExecutor(
            _PROCESSES, multiprocessing.get_context("spawn")
        ) as pool,
    ):
        # Also starts the pool, and brings the file into the system's cache.
        for port in (theirs, ours):
            _, wrong = _round(pool, port, target, 1, max(downloads // 25, 2))
            result.wrong += wrong
        result.memory_one = memory.peak_bytes(process)
        for number in range(rounds):
            for name, port, rates in (
                ("ours", ours, result.ours),
                ("nginx", theirs, result.nginx),
            ):
                rate, wrong = _round(pool, port, target, clients, downloads)
                rates.append(rate)
                result.wrong += wrong
                say(f"round {number + 1}: {name} {rate / 1e6:.0f} MB/s")
        result.memory_all = memory.peak_bytes(process)
    return result


def report(result: Result) -> str:
    """The result as lines of text."""

    def rates(found: list[float]) -> str:
        each = ", ".join(f"{rate / 1e6:.0f}" for rate in found)
        return f"{statistics.median(found) / 1e6:.0f} MB/s ({each})"

    return "\n".join(
        [
            f"{result.downloads} downloads of {result.size / 1e6:.1f} MB a "
            f"round by {result.clients} clients at once",
            f"wrong:   {result.wrong}",
            f"ours:    {rates(result.ours)}",
            f"nginx:   {rates(result.nginx)}",
            f"ratio:   {result.ratio:.2f}",
            f"memory:  {result.memory_one / 2**20:.1f} MiB with 1 client, "
            f"{result.memory_all / 2**20:.1f} MiB with {result.clients}: "
            f"{result.growth / 2**20:+.1f} MiB",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--architecture",
        default="R50x1",
        choices=list(variants.ARCHITECTURES),
    )
    parser.add_argument("--downloads", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        help="keeps the archive for the next run (default: a temporary one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.clients < 2 or args.rounds < 1 or args.downloads < args.clients:
        parser.error("needs 2 clients, a round, and a download for each client")
    with contextlib.ExitStack() as stack:
        directory = args.directory or pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory())
        )
        try:
            result = measure(
                make_tree(directory, args.architecture),
                downloads=args.downloads,
                clients=args.clients,
                rounds=args.rounds,
                say=lambda line: print(line, file=sys.stderr),
            )
        except (errors.BitTfError, OSError) as error:
            print(f"benchmarks.serving: error: {error}", file=sys.stderr)
            return 1
    if args.json:
        facts = dataclasses.asdict(result)
        print(json.dumps(facts | {"ratio": result.ratio}, indent=2))
    else:
        print(report(result))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
