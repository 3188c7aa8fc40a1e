"""Hostile requests over raw sockets: nothing from outside, and it goes on."""

import contextlib
import http.client
import os
import re
import socket
import time

import pytest
import repositories

CANARY = b"canary-d41d8cd9-outside-of-the-tree"
FIRST = "google/bit/m-r50x1/1"
HEADER_SECONDS = 1.0
STALL_SECONDS = 2.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository among secrets, with links to them."""
    folder = tmp_path_factory.mktemp("attacks")
    model = folder / "model"
    (model / "variables").mkdir(parents=True)
    (model / "saved_model.pb").write_bytes(b"graph" * 100)
    (model / "variables" / "variables.index").write_bytes(b"index" * 10_000)
    root = repositories.make_repository(folder / "root", {FIRST: model})
    secrets = folder / "secrets"
    secrets.mkdir()
    version = folder / "secrets" / "7"
    version.mkdir()
    for path in (
        folder / "secret.txt",
        secrets / "secret.txt",
        secrets / "index.html",
        secrets / "7.tar.gz",
        version / "entry.json",
        folder / "root-twin.txt",
        root / ".secret",
        root / "google" / ".secret.txt",
        root / ".staging" / "secret.txt",
        root / FIRST / ".secret",
    ):
        path.write_bytes(CANARY)
    (root / "link.txt").symlink_to(folder / "secret.txt")
    (root / "relative.txt").symlink_to("../secret.txt")
    (root / "folder").symlink_to(secrets)
    (root / "google" / "away").symlink_to(secrets)
    (root / "hidden.txt").symlink_to(".secret")
    (root / "loop").symlink_to("loop")
    (root / "proc").symlink_to("/proc/self")
    (root / "google" / "bit" / "m-r50x1" / "8.tar.gz").symlink_to(
        secrets / "7.tar.gz"
    )
    os.mkfifo(root / "pipe.txt")
    unreadable = root / "closed.txt"
    unreadable.write_bytes(CANARY if os.geteuid() else b"for root")
    unreadable.chmod(0)
    with open(root / "assets" / "big.bin", "wb") as file:
        file.truncate(24_000_000)
    return root


@pytest.fixture(scope="module")
def hub(root):
    before = (
        f"serving.HEADER_SECONDS = {HEADER_SECONDS}\n"
        f"serving.STALL_SECONDS = {STALL_SECONDS}"
    )
    with repositories.serving(root, before=before) as running:
        yield running
        assert running.stop() == 0
    # Every request was answered on purpose.
    assert not [line for line in running.log if "Traceback" in line]
    # Nothing that a client sent acts on a terminal or makes a line.
    for line in running.log:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[ -~]*\n", line)


def exchange(hub, data, timeout=5.0):
    """All that the server sends back until it closes, or is silent."""
    with socket.create_connection(("127.0.0.1", hub.port), timeout) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        return received(client)


def received(client):
    found = bytearray()
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := client.recv(2**16):
            found += part
    return bytes(found)


def request(target, *headers, method=b"GET"):
    if isinstance(target, str):
        target = target.encode()
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: h"]
    lines += [b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def lives(hub):
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().read() == b"ok\n"


PATHS = [
    "/../secret.txt",
    "/../../../../../../../../etc/passwd",
    "/google/../../secret.txt",
    "/%2e%2e/secret.txt",
    "/%2e%2e%2fsecret.txt",
    "/..%2fsecret.txt",
    "/..%2Fsecret.txt",
    "/.%2e/secret.txt",
    "/%252e%252e%252fsecret.txt",
    "/%25252e%25252e/secret.txt",
    "/..%c0%afsecret.txt",
    "/%c0%ae%c0%ae/secret.txt",
    "/%uff0e%uff0e/secret.txt",
    "/..%ef%bc%8fsecret.txt",
    "/..\\secret.txt",
    "/..%5csecret.txt",
    "/google%5c..%5c..%5csecret.txt",
    "/....//secret.txt",
    "/..;/secret.txt",
    "/./../secret.txt",
    "/google/bit/m-r50x1/1/../../../../../secret.txt",
    "/google/bit/m-r50x1/1/model/..%2f..%2f..%2f..%2f..%2f..%2fsecret.txt",
    "/..-twin.txt",
    "/../root-twin.txt",
    "//etc/passwd",
    "///etc/passwd",
    "/%2fetc/passwd",
    "/%2f%2fetc%2fpasswd",
    "/etc/passwd",
    "/C:/secret.txt",
    "/file:///etc/passwd",
    "/index.json%00.txt",
    "/%00",
    "/..%00/secret.txt",
    "/index.json%0a",
    "/index.json%0d%0aSet-Cookie:%20a=b",
    "/index.json%20",
    "/index.json.",
    "/index.json~",
    "/.secret",
    "/%2esecret",
    "/.staging/secret.txt",
    "/.locks",
    "/google/.secret.txt",
    f"/{FIRST}/.secret",
    "/.",
    "/..",
    "/google/.",
    "/link.txt",
    "/relative.txt",
    "/folder/secret.txt",
    "/folder/",
    "/folder/7.tar.gz",
    "/google/away/7.tar.gz",
    "/google/away/7?tf-hub-format=compressed",
    "/google/away?tf-hub-format=compressed",
    "/google/away/7/entry.json",
    "/google/bit/m-r50x1/8.tar.gz",
    "/google/bit/m-r50x1/8?tf-hub-format=compressed",
    "/../secrets/7?tf-hub-format=compressed",
    "/google/../../secrets/7.tar.gz",
    "/google/bit/..%2f..%2f..%2fsecrets/7?tf-hub-format=compressed",
    "/hidden.txt",
    "/loop",
    "/loop/loop",
    "/proc/environ",
    "/proc/self/environ",
    "/proc/root/etc/passwd",
    "/pipe.txt",
    "/google/bit/m-r50x1/1%2fmodel",
    "/google/bit/m-r50x1/+1?tf-hub-format=compressed",
    "/google/bit/m-r50x1/01?tf-hub-format=compressed",
    "/google/bit/m-r50x1/٣?tf-hub-format=compressed",
    "/" + "a" * 300,
    "/" + "a/" * 4000,
    "/" + "%41" * 4000,
    "/" + "../" * 4000 + "etc/passwd",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:50])
def test_paths(hub, path):
    answer = exchange(hub, request(path))
    assert CANARY not in answer
    assert b"root:" not in answer
    assert b"HOME=" not in answer
    status = int(answer.split()[1])
    assert status in (301, 400, 404)
    if status == 301:
        # A slash that was encoded is none.
        assert path == "/google/bit/m-r50x1/1%2fmodel"
    assert b"Set-Cookie" not in answer.split(b"\r\n\r\n")[0]
    assert lives(hub)


def test_the_canary_would_be_seen(root, hub):
    """The tests above could fail."""
    with open(root / "seen.txt", "wb") as file:
        file.write(CANARY)
    assert CANARY in exchange(hub, request("/seen.txt"))


BIG_HEADER = b"X-Big: " + b"a" * 2**20

RAW = {
    "nothing": b"",
    "one line end": b"\r\n",
    "garbage": bytes(range(256)) * 64,
    "TLS": bytes.fromhex("16030100f8010000f40303") + bytes(100),
    "HTTP/0.9": b"GET /../secret.txt\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: h\r\n\r\n",
    "no version": b"GET /\r\nHost: h\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "NUL in the path": b"GET /index.json\0.txt HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n",
    "bytes": b"GET /\xff\xfe\x80 HTTP/1.1\r\nHost: h\r\n\r\n",
    "a terminal's": b"GET /\x1b[2J\x1b]0;x\x07 HTTP/1.1\r\nHost: h\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\rHost: h\r\r",
    "a folded header": b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
    "a space before a colon": b"GET / HTTP/1.1\r\nHost : h\r\n\r\n",
    "1 MB header": request("/", BIG_HEADER),
    "1 MB target": request("/" + "a" * 2**20),
    "thousands of headers": request("/", *[b"A: b"] * 5000),
    "absolute form": request("http://other.example/../secret.txt"),
    "absolute form, file": request("file:///etc/passwd"),
    "absolute form, user": request("http://a@b/%2e%2e/secret.txt"),
    "absolute form, nested": request("http://h/http://h/../secret.txt"),
    "no slash": request("secret.txt"),
    "asterisk": request("*", method=b"OPTIONS"),
    "CONNECT": request("127.0.0.1:22", method=b"CONNECT"),
    "CONNECT a path": request("/index.json", method=b"CONNECT"),
    "TRACE": request("/", b"Cookie: secret", method=b"TRACE"),
    "lower case": request("/", method=b"get"),
    "a long method": request("/", method=b"A" * 5000),
    "PROPFIND": request("/", method=b"PROPFIND"),
    "PUT": b"PUT /x.txt HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\na",
    "DELETE": request("/index.json", method=b"DELETE"),
    "an upgrade": request("/", b"Upgrade: websocket", b"Connection: Upgrade"),
    "an upgrade to h2c": request("/", b"Upgrade: h2c", b"HTTP2-Settings: A"),
    "bad length": request("/", b"Content-Length: -1"),
    "two lengths": request("/", b"Content-Length: 0", b"Content-Length: 5"),
    "huge length": request("/", b"Content-Length: 99999999999999999999"),
    "100-continue": request(
        "/", b"Content-Length: 10", b"Expect: 100-continue"
    ),
    "bad chunks": request("/", b"Transfer-Encoding: chunked") + b"zz\r\n",
    "huge chunk": request("/", b"Transfer-Encoding: chunked")
    + b"f" * 40
    + b"\r\n",
    "another coding": request("/", b"Transfer-Encoding: gzip, chunked"),
    "garbage while it sends": request("/assets/big.bin") + b"\0" * 100_000,
    "bad If-None-Match": request("/", b'If-None-Match: "' + b'",' * 4000),
    "bad date": request("/", b"If-Modified-Since: " + b"9" * 5000),
    "a date before time": request(
        "/", b"If-Modified-Since: Mon, 01 Jan 0001 00:00:00 +2359"
    ),
    "a date after it": request(
        "/", b"If-Modified-Since: Fri, 31 Dec 9999 23:59:59 -2359"
    ),
    "a forged client": request(
        "/", b'X-Forwarded-For: \xe9"\\ 1.2.3.4 x', b"X-Forwarded-Proto: a"
    ),
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
def test_raw(hub, data):
    answer = exchange(hub, data, timeout=HEADER_SECONDS + 1.5)
    assert CANARY not in answer
    assert b"root:" not in answer
    assert b"Traceback" not in answer
    assert b"Internal Server Error" not in answer
    assert lives(hub)


@pytest.mark.parametrize(
    "name",
    ["1 MB header", "1 MB target", "two lengths", "no host", "HTTP/0.9"],
)
def test_raw_is_refused(hub, name):
    answer = exchange(hub, RAW[name], timeout=HEADER_SECONDS + 1.5)
    assert answer[:12] in (b"HTTP/1.1 400", b"")


@pytest.mark.parametrize("size", [16_000, 17_000, 40_000])
@pytest.mark.parametrize("kind", ["header", "headers", "target", "query"])
def test_headers_in_one_piece(hub, size, kind):
    text = b"x" * size
    data = {
        "header": request("/healthz", b"A: " + text),
        "headers": request("/healthz", *[b"A: " + b"x" * 95] * (size // 100)),
        "target": request(b"/" + text),
        "query": request(b"/healthz?" + text),
    }[kind]
    answer = exchange(hub, data, timeout=HEADER_SECONDS + 1.5)
    if size > 2**14:
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"connection: close" in answer.lower()
    else:
        assert answer[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 404")


SMUGGLED = b"GET /assets/style.css HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: %d" % len(SMUGGLED)],
        [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
        [b"Transfer-Encoding: xchunked"],
        [b"Transfer-Encoding : chunked"],
        [b"Transfer-Encoding: identity"],
        [b"Content-Length: 0x10"],
        [b"Content-Length: +5"],
        [b"Content-Length: 5,6"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("begin", [b"", b"0\r\n\r\n"], ids=["", "chunk"])
def test_smuggling(hub, headers, begin):
    """What may be a body for a proxy is never another request here."""
    lines = [b"GET /healthz HTTP/1.1", b"Host: h", *headers]
    data = b"\r\n".join(lines) + b"\r\n\r\n" + begin + SMUGGLED
    answer = exchange(hub, data, timeout=2)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert b"text/css" not in answer
    assert b"HTTP/1.1 200" not in answer
    assert lives(hub)


def test_pipelined(hub):
    """Requests without a body are answered one after the other."""
    data = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n" * 50
    answer = exchange(hub, data, timeout=1)
    assert answer.count(b"HTTP/1.1 200 OK") == 50


@pytest.mark.parametrize(
    "value",
    [
        b"bytes=0-18446744073709551616",
        b"bytes=-18446744073709551616",
        b"bytes=18446744073709551615-",
        b"bytes=-1--2",
        b"bytes=--1",
        b"bytes=1-0",
        b"bytes=" + b"9" * 10_000 + b"-",
        b"bytes=" + b"0-," * 4000 + b"0-",
        b"bytes=" + b",".join(b"%d-%d" % (i, i + 5) for i in range(1000)),
        b"bytes=0-0," + b" " * 10_000 + b"0-0",
        b"bytes" + b"=" * 10_000,
        b"bytes=" + b"1" * 5000 + b"-" + b"2" * 5000,
        b"bytes=0-9\r\nRange: bytes=5-6",
        b"\xff\xfe",
    ],
    ids=lambda value: value[:30],
)
def test_ranges(hub, value):
    """One answer, never longer than the file, at once."""
    start = time.monotonic()
    answer = exchange(hub, request("/index.json", b"Range: " + value), 10)
    assert time.monotonic() - start < 5
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in (200, 206, 400, 416)
    assert len(body) < 100_000
    assert CANARY not in answer
    assert lives(hub)


@pytest.mark.parametrize(
    "part",
    [b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nX: "],
    ids=["nothing", "a letter", "a line", "a header"],
)
def test_slow_headers(hub, part):
    """A request is to be whole after some time, however busy the client is."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", hub.port), 10) as client:
        client.sendall(part)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 8:
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    if not client.recv(100):
                        break
                if part:
                    client.sendall(b"a")
    assert 0.5 * HEADER_SECONDS < time.monotonic() - start < 6
    assert lives(hub)


def test_slow_headers_of_a_second_request(hub):
    with socket.create_connection(("127.0.0.1", hub.port), 8) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        first = b""
        while not first.endswith(b"ok\n"):
            first += client.recv(1000)
        client.sendall(b"GET /healthz HT")
        assert received(client) == b""
    assert lives(hub)


def test_a_slow_body(hub):
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", hub.port), 8) as client:
        client.sendall(request("/", b"Content-Length: 1000"))
        assert b"HTTP/1.1 400" in received(client)
    assert time.monotonic() - start < 5


def test_a_client_that_reads_nothing(hub):
    """It is dropped; one that reads slowly is not."""
    slow = socket.socket()
    silent = socket.socket()
    with slow, silent:
        for client in (slow, silent):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(10)
            client.connect(("127.0.0.1", hub.port))
            client.sendall(request("/assets/big.bin"))
        stop = time.monotonic() + 2.5 * STALL_SECONDS
        while time.monotonic() < stop:
            assert slow.recv(200_000)
            time.sleep(0.05)
        length = len(received(silent))
        assert length < 24_000_000
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        assert slow.recv(1000)
    assert lives(hub)


@pytest.mark.parametrize("path", ["/assets/big.bin", "/index.json", "/x"])
def test_half_closed(hub, path):
    with socket.create_connection(("127.0.0.1", hub.port), 5) as client:
        client.sendall(request(path))
        client.shutdown(socket.SHUT_WR)
        received(client)
    with socket.create_connection(("127.0.0.1", hub.port), 5) as client:
        client.sendall(b"GET /index.json HT")
        client.shutdown(socket.SHUT_WR)
        assert received(client) == b""
    assert lives(hub)


def test_clients_that_leave(hub):
    """Their downloads end, and no file stays open."""
    files = f"/proc/{hub.process.pid}/fd"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", hub.port)) as client:
            client.sendall(request("/assets/big.bin?leaves"))
            client.recv(10)
    for _ in range(100):
        open_files = [
            os.readlink(f"{files}/{name}")
            for name in os.listdir(files)
            if os.path.lexists(f"{files}/{name}")
        ]
        if not any("big.bin" in name for name in open_files):
            break
        time.sleep(0.05)
    else:
        pytest.fail("files are open still")
    assert lives(hub)
    lines = [line for line in hub.log if "?leaves" in line]
    assert len(lines) == 20
    assert not [line for line in lines if " 24000000 " in line]
