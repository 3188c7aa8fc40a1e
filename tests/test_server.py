import base64
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import repositories

from bit_tf import errors, handles
from hub_export import http_conditions, server, tree

MODEL = "google/bit/m-r50x1"
FIRST = f"{MODEL}/1"
CLASSIFIER = f"{MODEL}/ilsvrc2012_classification/1"
BIG = "assets/big.bin"
BIG_SIZE = 24_000_000
QUERY = "?tf-hub-format=compressed"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Files named as a SavedModel's; the archive has about 3 MB."""
    path = tmp_path_factory.mktemp("model") / "model"
    (path / "variables").mkdir(parents=True)
    (path / "assets").mkdir()
    (path / "saved_model.pb").write_bytes(b"graph" * 100)
    (path / "assets" / "page.html").write_text("<script>alert(1)</script>")
    data = path / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    return path


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    path = repositories.make_repository(
        tmp_path_factory.mktemp("hub") / "repository",
        {FIRST: model, f"{MODEL}/2": model, CLASSIFIER: model},
    )
    # More than the system's buffers of a connection hold.
    with open(path / BIG, "wb") as file:
        file.truncate(BIG_SIZE)
    return path


@pytest.fixture(scope="module")
def hub(root):
    with repositories.serving(root) as running:
        yield running


@pytest.fixture
def copy(root, tmp_path):
    """A repository that a test may damage."""
    return shutil.copytree(
        root,
        tmp_path / "copy",
        symlinks=True,
        ignore=shutil.ignore_patterns("big.bin"),
    )


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.body = response.read()

    @property
    def text(self):
        return self.body.decode()


def ask(hub, path, method="GET", body=None, **headers):
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        return Answer(connection.getresponse())


def archive(root, handle=FIRST):
    return tree.archive(root, handles.Handle.parse(handle)).read_bytes()


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def begin_download(hub):
    """A connection that has the beginning of an answer, and takes no more."""
    client = socket.socket()
    client.settimeout(60)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", hub.port))
    client.sendall(f"GET /{BIG} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    return client, client.recv(1000)


def rest_of(client):
    """What else is sent, taken as fast as it comes."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    received = bytearray()
    while part := client.recv(2**16):
        received += part
    return received


@pytest.mark.parametrize(
    "path",
    [
        f"/{FIRST}{QUERY}",
        f"/{FIRST}/{QUERY}",
        f"/{FIRST}?a=b&tf-hub-format=compressed",
        f"/{FIRST}.tar.gz",
        f"/{FIRST}.tar.gz{QUERY}",
        f"/{FIRST}.tar.gz/{QUERY}",
        f"/{FIRST}/model.tar.gz",
        "/google/bit/m%2Dr50x1/1.tar.gz",
    ],
)
def test_an_archive_at_every_spelling(hub, root, path):
    answer = ask(hub, path, Accept_Encoding="gzip, deflate, br")
    body = archive(root)
    sha256 = hashlib.sha256(body)
    assert answer.status == 200
    assert answer.body == body
    headers = answer.headers
    assert headers["content-type"] == "application/gzip"
    assert "content-encoding" not in headers
    assert headers["content-length"] == str(len(body))
    assert headers["accept-ranges"] == "bytes"
    assert headers["etag"] == f'"{sha256.hexdigest()}"'
    digest = base64.b64encode(sha256.digest()).decode()
    assert headers["repr-digest"] == f"sha-256=:{digest}:"
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["x-content-type-options"] == "nosniff"
    assert re.search("GMT$", headers["last-modified"])
    assert "server" not in headers
    head = ask(hub, path, "HEAD")
    assert head.body == b""
    assert head.status == 200
    assert {**head.headers, "date": ""} == {**headers, "date": ""}


@pytest.mark.parametrize(
    ("path", "location"),
    [
        (f"/{MODEL}{QUERY}", "m-r50x1/2.tar.gz"),
        (f"/{MODEL}/{QUERY}", "2.tar.gz"),
    ],
)
def test_without_a_version_the_newest(hub, root, path, location):
    answer = ask(hub, path)
    assert answer.status == 200
    assert answer.body == archive(root, f"{MODEL}/2")
    assert answer.headers["content-location"] == location
    assert answer.headers["cache-control"] == "no-cache"
    etag = answer.headers["etag"]
    assert ask(hub, path, If_None_Match=etag).status == 304


def test_a_version_published_meanwhile_is_served(copy, model):
    with repositories.serving(copy) as hub:
        assert ask(hub, f"/{MODEL}/3{QUERY}").status == 404
        before = ask(hub, "/index.json").headers["etag"]
        (model / "saved_model.pb").write_bytes(b"another" * 100)
        try:
            repositories.add_version(copy, f"{MODEL}/3", model)
        finally:
            (model / "saved_model.pb").write_bytes(b"graph" * 100)
        newest = ask(hub, f"/{MODEL}{QUERY}")
        assert newest.headers["content-location"] == "m-r50x1/3.tar.gz"
        assert newest.body == archive(copy, f"{MODEL}/3")
        assert newest.body != archive(copy, FIRST)
        assert ask(hub, f"/{MODEL}/3/").status == 200
        index = ask(hub, "/index.json", If_None_Match=before)
        assert index.status == 200
        assert f'"{MODEL}"' in index.text


def test_pages(hub, root):
    for path in ("/", f"/{FIRST}/", f"/{MODEL}/", "/google/bit/", "/google/"):
        answer = ask(hub, path)
        file = root / path.strip("/") / "index.html"
        assert answer.status == 200
        assert answer.body == file.read_bytes()
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        if path != "/":
            # Relative links need the slash.
            answer = ask(hub, path.rstrip("/"))
            name = path.split("/")[-2]
            assert answer.status == 301
            assert answer.headers["location"] == f"{name}/"


def test_every_file_of_the_tree(hub, root):
    """But for those that begin with a dot."""
    asked = 0
    for folder, _, names in os.walk(root):
        for name in names:
            file = os.path.join(folder, name)
            path = os.path.relpath(file, root)
            answer = ask(hub, f"/{path}")
            if path.startswith(".") or "/." in path:
                assert answer.status == 404
                continue
            asked += 1
            with open(file, "rb") as stream:
                assert answer.body == stream.read()
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["etag"].startswith('"')
            kept = "immutable" in answer.headers["cache-control"]
            assert kept == bool(re.search(r"/[12](/|\.tar\.gz)", path))
    assert asked > 30


def test_what_others_made_is_no_page(hub):
    answer = ask(hub, f"/{FIRST}/model/assets/page.html")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-security-policy"] == "sandbox"


@pytest.mark.parametrize(
    ("path", "type"),
    [
        ("index.json", "application/json"),
        ("assets/style.css", "text/css; charset=utf-8"),
        ("assets/script.js", "text/javascript; charset=utf-8"),
        (f"{FIRST}/card.md", "text/markdown; charset=utf-8"),
        (f"{FIRST}/model/saved_model.pb", "application/octet-stream"),
    ],
)
def test_types(hub, path, type):
    assert ask(hub, f"/{path}").headers["content-type"] == type


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        (f"/{FIRST}?tf-hub-format=zip", 400, "compressed or uncompressed"),
        (f"/{FIRST}?tf-hub-format=", 400, "compressed or uncompressed"),
        (f"/{FIRST}{QUERY}&tf-hub-format=x", 400, "or uncompressed"),
        (f"/{FIRST}?{'a&' * 100}{QUERY[1:]}", 400, "64"),
        (f"/{FIRST}?tf-hub-format=uncompressed", 406, "compressed"),
        (f"/{MODEL}/9{QUERY}", 404, f"{MODEL}/9 is not published"),
        (f"/{MODEL}/9.tar.gz", 404, f"{MODEL}/9 is not published"),
        (f"/{MODEL}/9", 404, "nothing here"),
        (f"/{MODEL}/0{QUERY}", 404, "handle"),
        (f"/google/bit/none{QUERY}", 404, "No version of google/bit/none"),
        (f"/google{QUERY}", 404, "handle"),
        (f"/{QUERY}", 404, "handle"),
        (f"/assets/style.css{QUERY}", 404, "handle"),
        ("/assets", 404, "nothing here"),
        (f"/{FIRST}/model", 404, "nothing here"),
        (f"/{FIRST}/model/", 404, "nothing here"),
        ("/index.json/", 404, "nothing here"),
        ("//index.json", 404, "nothing here"),
        ("/healthz/", 404, "nothing here"),
    ],
)
def test_refusals(hub, path, status, text):
    answer = ask(hub, path)
    assert answer.status == status
    assert text in answer.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "immutable" not in answer.headers.get("cache-control", "")


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"]
)
def test_read_only(hub, method):
    answer = ask(hub, f"/{FIRST}/", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_a_request_has_no_body(hub):
    answer = ask(hub, "/index.json", body=b"x" * 10)
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    answer = ask(hub, "/index.json", "POST", b"x" * 10)
    assert answer.status == 405
    assert answer.headers["connection"] == "close"


ETAG, DATE, PAST = "ETAG", "DATE", "Sat, 01 Jan 2000 00:00:00 GMT"
FUTURE = "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": ETAG}, 304),
        ({"If-None-Match": f"W/{ETAG}"}, 304),
        ({"If-None-Match": f'"a", {ETAG}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"a"'}, 200),
        ({"If-None-Match": "no quotes"}, 200),
        # The tag counts, where both are there.
        ({"If-None-Match": '"a"', "If-Modified-Since": FUTURE}, 200),
        ({"If-Modified-Since": DATE}, 304),
        ({"If-Modified-Since": FUTURE}, 304),
        ({"If-Modified-Since": PAST}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Match": ETAG}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f"W/{ETAG}"}, 412),
        ({"If-Match": '"a"'}, 412),
        ({"If-Unmodified-Since": PAST}, 412),
        ({"If-Unmodified-Since": DATE}, 200),
        ({"Range": "bytes=0-9", "If-Range": ETAG}, 206),
        ({"Range": "bytes=0-9", "If-Range": DATE}, 206),
        ({"Range": "bytes=0-9", "If-Range": '"a"'}, 200),
        ({"Range": "bytes=0-9", "If-Range": f"W/{ETAG}"}, 200),
        ({"Range": "bytes=0-9", "If-Range": PAST}, 200),
        ({"Range": "bytes=0-9", "If-None-Match": ETAG}, 304),
    ],
)
@pytest.mark.parametrize("path", [f"/{FIRST}.tar.gz", "/index.json"])
def test_conditions(hub, path, headers, status):
    whole = ask(hub, path, "HEAD").headers
    filled = {
        name: value.replace(ETAG, whole["etag"]).replace(
            DATE, whole["last-modified"]
        )
        for name, value in headers.items()
    }
    answer = ask(hub, path, **filled)
    assert answer.status == status
    assert answer.headers["etag"] == whole["etag"]
    assert answer.headers["cache-control"] == whole["cache-control"]
    if status == 304:
        assert answer.body == b""
    if status == 206:
        assert len(answer.body) == 10


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-100", slice(-100, None)),
        ("bytes=-99999999999999999999999", slice(None)),
        ("bytes=5-99999999999999999999999999999", slice(5, None)),
        (f"bytes=0000{'0' * 5000}5-6", slice(5, 7)),
    ],
)
def test_a_range(hub, root, value, part):
    body = archive(root)
    answer = ask(hub, f"/{FIRST}{QUERY}", Range=value)
    start, stop, _ = part.indices(len(body))
    assert answer.status == 206
    assert answer.body == body[part]
    assert answer.headers["content-length"] == str(stop - start)
    assert (
        answer.headers["content-range"]
        == f"bytes {start}-{stop - 1}/{len(body)}"
    )
    head = ask(hub, f"/{FIRST}{QUERY}", "HEAD", Range=value)
    assert head.headers["content-range"] == answer.headers["content-range"]


@pytest.mark.parametrize(
    "value", ["bytes=SIZE-", "bytes=-0", f"bytes={'9' * 5000}-"]
)
def test_a_range_beyond_the_end(hub, root, value):
    size = len(archive(root))
    value = value.replace("SIZE", str(size))
    answer = ask(hub, f"/{FIRST}.tar.gz", Range=value)
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{size}"
    assert answer.headers.get("content-type") == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "value",
    [
        "bytes=0-1,5-6",
        "bytes=" + ",".join(["0-"] * 2000),
        "bytes=9-5",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=-5-6",
        "items=0-5",
        "bytes=١-٢",
    ],
)
def test_a_range_to_be_ignored(hub, root, value):
    answer = ask(hub, f"/{FIRST}.tar.gz", Range=value.encode())
    assert answer.status == 200
    assert answer.body == archive(root)


def test_an_empty_file(copy):
    (copy / "assets" / "empty.txt").touch()
    with repositories.serving(copy) as hub:
        answer = ask(hub, "/assets/empty.txt")
        assert answer.status == 200
        assert answer.headers["content-length"] == "0"
        answer = ask(hub, "/assets/empty.txt", Range="bytes=0-")
        assert answer.status == 416


def test_a_bucket(root):
    for bucket in ("gs://models", "gs://models/public/hub/"):
        with repositories.serving(root, "--bucket", bucket) as hub:
            base = bucket.rstrip("/")
            for handle, version in ((FIRST, 1), (MODEL, 2), (f"{FIRST}/", 1)):
                answer = ask(hub, f"/{handle}?tf-hub-format=uncompressed")
                assert answer.status == 303
                assert answer.text == f"{base}/{MODEL}/{version}/model"
                assert "location" not in answer.headers
            answer = ask(hub, f"/{MODEL}/9?tf-hub-format=uncompressed")
            assert answer.status == 404


def test_a_root_path(root):
    with repositories.serving(root, "--root-path", "/models/hub/") as hub:
        assert hub.url.endswith("/models/hub/")
        # The proxy may strip it, or not.
        for prefix in ("", "/models/hub"):
            assert ask(hub, f"{prefix}/healthz").status == 200
            assert ask(hub, f"{prefix}/{FIRST}{QUERY}").status == 200
            answer = ask(hub, f"{prefix}/{FIRST}")
            assert answer.headers["location"] == "1/"
        answer = ask(hub, "/models/hub")
        assert answer.status == 301
        assert answer.headers["location"] == "hub/"
        assert ask(hub, "/models/hubs/index.json").status == 404


def test_an_absolute_address(hub, root):
    """As clients of a proxy send it."""
    answer = ask(hub, f"http://example.org:80/{FIRST}{QUERY}")
    assert answer.body == archive(root)
    assert ask(hub, "http://example.org").status == 200


def test_keep_alive(hub):
    connection = http.client.HTTPConnection("127.0.0.1", hub.port)
    with contextlib.closing(connection):
        connection.connect()
        taken = connection.sock.getsockname()
        for path in ("/healthz", "/nothing", f"/{FIRST}", "/index.json"):
            connection.request("GET", path)
            connection.getresponse().read()
            assert connection.sock.getsockname() == taken


def test_log(root):
    with repositories.serving(root) as hub:
        size = len(ask(hub, "/index.json?a=b").body)
        ask(hub, "/nothing%0a%1b[2J", "HEAD")
        hub.stop()
    for line in hub.log:
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 "
            r'"(GET|HEAD) [!-~]+ HTTP/1\.1" \d{3} \d+ \d+\.\d ms\n',
            line,
        )
    first, second = hub.log
    assert f'"GET /index.json?a=b HTTP/1.1" 200 {size} ' in first
    assert '"HEAD /nothing%0a%1b[2J HTTP/1.1" 404 0 ' in second


def test_no_log(root):
    with repositories.serving(root, "--no-access-log") as hub:
        ask(hub, "/index.json")
        hub.stop()
    assert hub.log == []


def test_damage_is_told_not_served(copy):
    """An archive of another size, and entries of other kinds."""
    path = tree.archive(copy, handles.Handle.parse(FIRST))
    with open(path, "ab") as file:
        file.write(b"x")
    entry = copy / MODEL / "2" / "entry.json"
    entry.write_text(entry.read_text()[:-10])
    other = copy / CLASSIFIER / "entry.json"
    shutil.copy(copy / FIRST / "entry.json", other)
    with repositories.serving(copy) as hub:
        for handle in (FIRST, f"{MODEL}/2", CLASSIFIER):
            for method in ("GET", "HEAD"):
                answer = ask(hub, f"/{handle}{QUERY}", method)
                assert answer.status == 500
                assert "immutable" not in answer.headers.get(
                    "cache-control", ""
                )
        assert ask(hub, f"/{MODEL}/").status == 200
        hub.stop()
    log = "".join(hub.log)
    assert f"{FIRST}.tar.gz is damaged: it has" in log
    assert f"{MODEL}/2/entry.json is damaged" in log
    assert f"{CLASSIFIER}/entry.json is of {FIRST}" in log
    assert "Traceback" not in log


def test_a_file_that_shrinks(copy):
    """The client sees that it has not all."""
    with open(copy / BIG, "wb") as file:
        file.truncate(BIG_SIZE)
    with repositories.serving(copy) as hub:
        client, received = begin_download(hub)
        with client:
            os.truncate(copy / BIG, BIG_SIZE // 2)
            received += rest_of(client)
        assert f"content-length: {BIG_SIZE}".encode() in received
        assert len(received) < BIG_SIZE
        assert ask(hub, "/healthz").status == 200
        hub.stop()
    assert "shorter" in "".join(hub.log)


def test_without_the_page_cache(root):
    """Where the system cannot tell whether a read would wait."""
    before = "served_files.read_cached = lambda *arguments: None"
    with repositories.serving(root, before=before) as hub:
        assert ask(hub, f"/{FIRST}.tar.gz").body == archive(root)
        answer = ask(hub, f"/{FIRST}.tar.gz", Range="bytes=9-300000")
        assert answer.body == archive(root)[9:300001]


def test_many_at_once(root):
    body = archive(root)
    right = []
    with repositories.serving(root) as hub:

        def work():
            for _ in range(4):
                right.append(ask(hub, f"/{FIRST}{QUERY}").body == body)

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 64


def test_a_limit_of_requests(root):
    with (
        repositories.serving(root, "--limit-concurrency", "2") as hub,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(2):
            client, received = begin_download(hub)
            stack.enter_context(client)
            assert received.startswith(b"HTTP/1.1 200")
        answer = ask(hub, "/healthz")
        assert answer.status == 503
        assert answer.headers["retry-after"] == "5"
        stack.close()
        wait_for(lambda: ask(hub, "/healthz").status == 200)
        # Idle connections are bounded, too: twice as many.
        for _ in range(8):
            client = stack.enter_context(
                socket.create_connection(("127.0.0.1", hub.port), 5)
            )
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_downloads_end(root, number):
    with repositories.serving(root) as hub:
        client, received = begin_download(hub)
        idle = socket.create_connection(("127.0.0.1", hub.port))
        with client, idle:
            hub.process.send_signal(number)
            wait_for(lambda: refused(hub))
            # Nothing was asked on it.
            assert idle.recv(1) == b""
            assert hub.process.poll() is None
            received += rest_of(client)
        assert len(received.partition(b"\r\n\r\n")[2]) == BIG_SIZE
        assert hub.process.wait(30) == 0
    assert "Traceback" not in "".join(hub.log)


def refused(hub):
    try:
        socket.create_connection(("127.0.0.1", hub.port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_stop_waits_no_longer_than_the_grace(root):
    with repositories.serving(root, "--grace", "1") as hub:
        client, _ = begin_download(hub)
        with client:
            start = time.monotonic()
            assert hub.stop() == 0
            assert 0.9 < time.monotonic() - start < 8
    assert "Traceback" not in "".join(hub.log)


def test_the_root_goes_away(copy):
    with repositories.serving(copy) as hub:
        assert ask(hub, "/healthz").text == "ok\n"
        moved = copy.rename(copy.with_name("moved"))
        assert ask(hub, "/healthz").status == 503
        for path in ("/", f"/{FIRST}{QUERY}", f"/{MODEL}{QUERY}"):
            assert ask(hub, path).status == 404
        moved.rename(copy)
        assert ask(hub, "/healthz").status == 200
        assert ask(hub, f"/{FIRST}{QUERY}").status == 200
        (copy / "index.json").unlink()
        assert ask(hub, "/healthz").status == 503


def test_two_at_one_port(hub, root, call):
    code, _, stderr = call("hub-export", "serve", root, "--port", hub.port)
    assert code == 1
    assert f"port {hub.port}" in stderr
    assert "Choose another --port" in stderr
    assert ask(hub, "/healthz").status == 200


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--bucket", "s3://name"], "gs://name"),
        (["--bucket", "gs://Name"], "gs://name"),
        (["--bucket", "gs://name/../x"], "gs://name"),
        (["--bucket", "gs://name//x"], "gs://name"),
        (["--bucket", ""], "gs://name"),
        (["--root-path", "hub"], "begins with a slash"),
        (["--root-path", "/a b"], "begins with a slash"),
        (["--root-path", "/../hub"], "begins with a slash"),
        (["--root-path", "/google"], "Choose another"),
        (["--host", "no.such.host.invalid"], "address of this machine"),
        (["--limit-concurrency", "999999999"], "--limit-concurrency"),
    ],
)
def test_configuration_is_checked(root, call, options, text):
    code, stdout, stderr = call("hub-export", "serve", root, *options)
    assert code == 1
    assert stdout == ""
    assert text in stderr
    assert "Received" in stderr


def test_a_directory_that_is_no_repository(tmp_path, call):
    for path in (tmp_path, tmp_path / "missing", __file__):
        code, _, stderr = call("hub-export", "serve", path)
        assert code == 1
        assert "hub-export publish" in stderr


def test_an_unfinished_repository(tmp_path, call):
    (tmp_path / ".locks").mkdir()
    code, _, stderr = call("hub-export", "serve", tmp_path)
    assert code == 1
    assert "Publish again" in stderr


@pytest.mark.parametrize(
    "options",
    [["--port", "65536"], ["--port", "x"], ["--grace", "-1"], []],
)
def test_usage(call, options, tmp_path):
    arguments = [tmp_path, *options] if options else []
    assert call("hub-export", "serve", *arguments)[0] == 2


def test_a_missing_extra(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[serve\]"):
        server.application(root)


def test_serving_loads_no_tensorflow(root):
    code = (
        "import sys, socket\n"
        "from hub_export import server, serving\n"
        f"server.application({str(root)!r})\n"
        "import uvicorn.protocols.http.h11_impl\n"
        "found = {'tensorflow', 'keras', 'PIL'} & set(sys.modules)\n"
        "sys.exit(repr(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mounted_in_another_application(root):
    """The application is one of any ASGI server, under any path."""
    import asyncio

    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/models", server.application(root))])

    async def asked(path):
        sent = []
        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if not messages:
                # The client stays.
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "root_path": "",
        }
        await app(scope, receive, send)
        return sent

    sent = asyncio.run(asked(f"/models/{FIRST}"))
    assert sent[0]["status"] == 301
    sent = asyncio.run(asked(f"/models/{FIRST}/entry.json"))
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=9-20", (9, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=-0", (10, 10)),
        ("bytes=3-2", None),
        ("bytes=0-1,3-4", None),
    ],
)
def test_byte_range(value, expected):
    assert http_conditions.byte_range(value, 10) == expected


def test_tensorflow_hub(small_export, features_export, tmp_path):
    """hub.load and hub.KerasLayer, from here and from a plain file server."""
    import tensorflow as tf

    root = repositories.make_repository(
        tmp_path / "repository",
        {FIRST: features_export, CLASSIFIER: small_export},
    )
    site = repositories.make_site(root, tmp_path / "site")
    with (
        repositories.serving(root, "--bucket", "gs://name/hub") as hub,
        repositories.static_host(site) as static,
    ):
        *found, address = repositories.loaded_in_fresh_process(
            tmp_path,
            [
                f"{hub.url}{FIRST}",
                f"{hub.url}{MODEL}",
                f"{hub.url}{CLASSIFIER}",
                f"{static}{FIRST}.tar.gz",
                f"uncompressed {hub.url}{FIRST}",
            ],
        )
    assert address[""] == f"gs://name/hub/{FIRST}/model"
    exports = (features_export, features_export, small_export, features_export)
    for outputs, export in zip(found, exports, strict=True):
        model = tf.saved_model.load(str(export))
        expected = model(tf.constant(repositories.pixels())).numpy()
        for output in (outputs["load"], outputs["layer"]):
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert not any("30" in line.split('"')[2][:4] for line in hub.log[:-1])
