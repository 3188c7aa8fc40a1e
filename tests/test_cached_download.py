import contextlib
import email.utils
import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time

import file_server
import pytest
import requests
from file_server import Reply

from bit_tf import cached_download, errors

BODY = random.Random(0).randbytes(3_000_000)
PATH = "/models/weights.npz"
NAME = "weights.npz"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with file_server.running() as running:
        running.bodies[PATH] = BODY
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch):
    directory = tmp_path / "cache"
    monkeypatch.setenv("BIT_TF_CACHE", str(directory))
    return directory


def fetch(server, path=PATH, **options):
    return cached_download.cached(
        server.url + path, **({"backoff": 0.01, "timeout": 5.0} | options)
    )


def names(cache):
    """What lies in the cache, but for locks."""
    found = (path.name for path in cache.iterdir()) if cache.is_dir() else ()
    return sorted(name for name in found if not name.endswith(".lock"))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def refused(server, cache, match, **options):
    """Asserts that the download fails, and leaves nothing at its name."""
    with pytest.raises(errors.DownloadError, match=match) as caught:
        fetch(server, **options)
    assert NAME not in names(cache)
    assert f"{NAME}.json" not in names(cache)
    assert not [name for name in names(cache) if name.endswith(".tmp")]
    assert "Received" in str(caught.value) or "could not be" in str(
        caught.value
    )
    return caught.value


def test_a_file_is_downloaded_once(server, cache, capsys):
    path = fetch(server, size=len(BODY))
    assert path == cache / NAME
    assert path.read_bytes() == BODY
    record = json.loads((cache / f"{NAME}.json").read_text())
    assert record.pop("downloaded").endswith("+00:00")
    assert record == {
        "url": server.url + PATH,
        "size": len(BODY),
        "sha256": sha256(BODY),
        "etag": f'"{len(BODY)}"',
    }
    assert names(cache) == [NAME, f"{NAME}.json"]
    assert fetch(server) == path
    assert len(server.seen) == 1
    assert server.seen[0].headers["accept-encoding"] == "identity"
    assert server.seen[0].range is None
    assert capsys.readouterr() == ("", "")


def test_a_home_of_nobody(server, monkeypatch):
    monkeypatch.setenv("BIT_TF_CACHE", "~nobody-has-this-name/x")
    with pytest.raises(errors.DownloadError, match="BIT_TF_CACHE") as caught:
        fetch(server)
    assert "'~nobody-has-this-name/x'" in str(caught.value)
    assert server.seen == []


def test_names_and_directories(server, cache, tmp_path):
    path = fetch(server, name="vtab/other.npz", directory=tmp_path / "here")
    assert path == tmp_path / "here" / "vtab" / "other.npz"
    assert not cache.exists()
    for name in ("../up", "/root", "", "a/../../b", "a\\b", "a\0"):
        with pytest.raises(errors.DownloadError, match="relative name"):
            fetch(server, name=name)
    with pytest.raises(errors.DownloadError, match="relative name"):
        fetch(server, "/folder/")
    # A name belongs to one URL.
    server.bodies["/else/weights.npz"] = b"else"
    fetch(server)
    with pytest.raises(errors.DownloadError, match=r"was downloaded from .*/m"):
        fetch(server, "/else/weights.npz")


@pytest.mark.parametrize(
    "url", ["ftp://h/x.npz", "/x.npz", "http://", "http://h:port/x", "http://["]
)
def test_what_is_no_url(cache, url):
    with pytest.raises(errors.DownloadError, match="https://host"):
        cached_download.cached(url)
    assert not cache.exists()


def test_a_cut_connection_is_resumed(server, cache):
    server.replies = [Reply(cut=0.3)]
    assert fetch(server).read_bytes() == BODY
    first, second = server.seen
    kept = int(second.range.removeprefix("bytes=").removesuffix("-"))
    # No more than one block was asked for twice.
    assert first.sent - 2**18 <= kept <= first.sent == len(BODY) * 3 // 10
    assert second.headers["if-range"] == f'"{len(BODY)}"'
    assert second.sent == len(BODY) - kept
    assert names(cache) == [NAME, f"{NAME}.json"]


def test_progress_is_not_counted_as_failure(server, cache):
    server.replies = [Reply(cut=0.4), Reply(cut=0.6)]
    assert fetch(server, attempts=2).read_bytes() == BODY
    assert len(server.seen) == 3


def test_attempts_end(server, cache):
    server.replies = [Reply(cut=0.1)] + [Reply(cut=0)] * 9
    error = refused(server, cache, "3 attempts in a row", attempts=3)
    assert str(len(BODY)) in str(error)
    assert "goes on there" in str(error)
    assert error.__cause__ is not None
    assert len(server.seen) == 3
    assert names(cache) == [f"{NAME}.part", f"{NAME}.part.json"]
    # The next call goes on.
    server.replies = []
    length = (cache / f"{NAME}.part").stat().st_size
    assert fetch(server).read_bytes() == BODY
    assert server.seen[-1].range == f"bytes={length}-"
    assert length > 0


def test_a_server_without_validators_starts_over(server, cache):
    server.etags[PATH] = None
    server.replies = [Reply(cut=0.3)]
    assert fetch(server).read_bytes() == BODY
    assert [seen.range for seen in server.seen] == [None, None]


def test_a_weak_etag_is_none(server, cache):
    server.etags[PATH] = 'W/"1"'
    server.replies = [Reply(cut=0.3)]
    assert fetch(server).read_bytes() == BODY
    assert [seen.range for seen in server.seen] == [None, None]


def test_the_time_of_change_is_a_validator(server, cache):
    server.etags[PATH] = None
    date = email.utils.formatdate(0, usegmt=True)
    server.replies = [
        Reply(cut=0.3, headers={"Last-Modified": date}),
        Reply(headers={"Last-Modified": date}),
    ]
    assert fetch(server).read_bytes() == BODY
    assert server.seen[1].headers["if-range"] == date
    # The test's server knows no dates, and sends the whole file.
    assert server.seen[1].sent == len(BODY)


def test_a_server_that_ignores_ranges(server, cache):
    server.replies = [Reply(cut=0.5), Reply(ignore_range=True)]
    assert fetch(server).read_bytes() == BODY
    assert server.seen[1].range is not None
    assert server.seen[1].sent == len(BODY)


def test_a_file_that_changes_midway(server, cache):
    """Both as a good server tells it, and as a bad one does."""
    new = BODY[::-1]

    def change(handler):
        file_server.FileServer.answer(server, handler)
        server.bodies[PATH], server.etags[PATH] = new, '"new"'

    server.answer = change
    server.replies = [Reply(cut=0.4)]
    assert fetch(server).read_bytes() == new
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"new"'},
        {"Content-Range": None},
        {"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"},
        {"Content-Range": "other"},
        "total",
    ],
)
def test_a_range_that_does_not_fit(server, cache, headers):
    def lie(handler):
        if (given := handler.headers["Range"]) and headers == "total":
            start = given.removeprefix("bytes=").removesuffix("-")
            server.replies[0].headers = {
                "Content-Range": f"bytes {start}-{len(BODY)}/{len(BODY) + 1}"
            }
        file_server.FileServer.answer(server, handler)

    server.answer = lie
    server.replies = [
        Reply(cut=0.5),
        Reply(headers={} if headers == "total" else headers),
    ]
    assert fetch(server).read_bytes() == BODY
    assert [seen.range is None for seen in server.seen] == [True, False, True]


def test_a_refused_range_starts_over(server, cache):
    server.replies = [Reply(cut=0.5), Reply(status=416)]
    assert fetch(server).read_bytes() == BODY
    assert [seen.range is None for seen in server.seen] == [True, False, True]


def test_a_capped_range_goes_on(server, cache):
    """A server may send less than what was asked for."""

    def cap(handler):
        reply = Reply()
        if given := handler.headers["Range"]:
            start = int(given.removeprefix("bytes=").removesuffix("-"))
            stop = min(start + 10**6, len(BODY))
            reply = Reply(
                status=206,
                body=BODY[start:stop],
                headers={
                    "ETag": f'"{len(BODY)}"',
                    "Content-Range": f"bytes {start}-{stop - 1}/{len(BODY)}",
                },
            )
        elif not server.seen:
            reply = Reply(cut=0.1)
        server.replies = [reply]
        file_server.FileServer.answer(server, handler)

    server.answer = cap
    assert fetch(server).read_bytes() == BODY
    assert [seen.range is None for seen in server.seen].count(True) == 1


def test_a_stalled_server(server, cache):
    server.replies = [Reply(cut=0.4, stall=30)]
    start = time.monotonic()
    assert fetch(server, timeout=0.4).read_bytes() == BODY
    assert time.monotonic() - start < 10
    assert server.seen[1].range is not None


def test_a_server_that_never_answers(server, cache):
    server.answer = lambda handler: server.closing.wait(30)
    error = refused(server, cache, "timed out", timeout=0.2, attempts=2)
    assert isinstance(error.__cause__, Exception)
    assert names(cache) == []


def test_a_server_that_is_not_there(cache, server):
    with file_server.running() as other:
        url = other.url
    with pytest.raises(errors.DownloadError, match="refused") as caught:
        cached_download.cached(f"{url}{PATH}", attempts=2, backoff=0.01)
    assert NAME in str(caught.value)
    assert names(cache) == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 300, 204])
def test_refusals_are_final(server, cache, status):
    server.replies = [Reply(status=status)]
    error = refused(server, cache, f"answered {status}")
    assert server.url + PATH in str(error)
    assert len(server.seen) == 1
    assert names(cache) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_failures_of_servers_are_not(server, cache, status):
    server.replies = [Reply(status=status)]
    assert fetch(server).read_bytes() == BODY
    assert len(server.seen) == 2


def test_waits_double(server, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.replies = [Reply(status=500)] * 9
    refused(server, cache, "answered 500", attempts=5, backoff=1.0)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_retry_after(server, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    later = email.utils.formatdate(time.time() + 50, usegmt=True)
    past = email.utils.formatdate(0)
    server.replies = [
        Reply(status=429, headers={"Retry-After": value})
        for value in ("7", "86400", later, past, "soon")
    ]
    assert fetch(server, attempts=9, backoff=0.5).read_bytes() == BODY
    assert waits[:2] == [7.0, 120.0]
    assert 40 < waits[2] <= 50
    assert waits[3:] == [0.0, 8.0]


def test_redirects(server, cache):
    signed = Reply(status=302, headers={"Location": f"{PATH}?signature=1"})
    server.replies = [signed, Reply(cut=0.5), signed]
    assert fetch(server, "/here/weights.npz").read_bytes() == BODY
    assert server.seen[3].target == f"{PATH}?signature=1"
    assert server.seen[3].range is not None
    server.replies = [Reply(status=302, headers={"Location": PATH})] * 40
    with pytest.raises(errors.DownloadError, match="without end"):
        fetch(server, "/again/other.npz", name="other.npz")


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("file:///etc/passwd", "redirects to an address that is not http or"),
        ("ftp://127.0.0.1/x", "redirects to an address that is not http or"),
        ("http://[::1/hush", "redirects to an address that is malformed"),
        ("http://127.0.0.1:hush/x", "redirects to an address that is malforme"),
        ("http://127.0.0.1:99999/", "redirects to an address that is malforme"),
    ],
)
def test_redirects_to_nowhere(server, cache, location, told):
    server.replies = [
        Reply(status=302, headers={"Location": PATH}),
        Reply(status=302, headers={"Location": location}),
    ]
    error = refused(server, cache, told)
    assert "hush" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert len(server.seen) == 2


@pytest.fixture
def proxy(monkeypatch):
    """Sets one variable of proxies, and no other."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("nonsense://[", "not of the form"),
        ("http://hush:hush@[::1", "not of the form"),
        ("http://", "not of the form"),
        ("hush:hush", "not of the form"),
        ("ftp://hush:1", "not of the form"),
        ("socks5://hush@127.0.0.1:9", r"requests\[socks\]"),
    ],
)
def test_proxies_that_cannot_be(server, cache, proxy, name, value, told):
    if value.startswith("socks") and importlib.util.find_spec("socks"):
        pytest.skip("PySocks is here; uninstall it to see its lack reported")
    proxy(name, value)
    error = refused(server, cache, f"the proxy set by {name} is .*{told}")
    assert "hush" not in str(error)
    assert "address is malformed" not in str(error)
    assert server.seen == []


def test_proxies_are_not_blamed_for_addresses(server, cache, proxy):
    proxy("http_proxy", server.url)
    with pytest.raises(errors.DownloadError, match="address is malformed"):
        cached_download.cached("http://*hush/x.npz")
    # Nor are those that do not matter.
    proxy("http_proxy", "http://[")
    proxy("no_proxy", "127.0.0.1,a..b")
    with pytest.raises(errors.DownloadError, match="address is malformed"):
        cached_download.cached("http://a..b/x.npz")
    assert fetch(server).read_bytes() == BODY
    proxy("no_proxy", "127.0.0.1")
    server.replies = [Reply(status=302, headers={"Location": "http://h/x"})]
    with pytest.raises(errors.DownloadError, match="set by http_proxy is"):
        fetch(server, "/other.npz")


def test_certificates_are_final(server, cache, tmp_path, monkeypatch):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl for a certificate: apt-get install openssl")
    options = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(
        [openssl, *options.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", None)
    error = refused(server, cache, r"not be verified \(self.signed certif")
    assert "REQUESTS_CA_BUNDLE" in str(error)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    error = refused(server, cache, r"CA certificate bundle.*none\.pem")
    assert "BIT_TF_CACHE" not in str(error)
    assert server.seen == []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    assert fetch(server).read_bytes() == BODY


def test_another_size_is_refused_before_the_body(server, cache):
    error = refused(server, cache, str(len(BODY)), size=10)
    assert " 10 bytes" in str(error)
    assert len(server.seen) == 1
    assert names(cache) == []


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1])
def test_another_size_without_a_length(server, cache, size):
    server.replies = [Reply(headers={"Content-Length": None})]
    refused(server, cache, f"has {size} bytes", size=size)
    assert names(cache) == []


def test_a_length_must_be_known(server, cache):
    """A cut body could not be told from a whole one."""
    server.replies = [Reply(headers={"Content-Length": None}, cut=0.5)]
    refused(server, cache, "how long the file is")
    server.replies = [Reply(headers={"Content-Length": None})]
    assert fetch(server, size=len(BODY)).read_bytes() == BODY


def chunked(parts, end=True):
    """A reply in chunks, which names no length."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
    return Reply(
        body=body + b"0\r\n\r\n" * end,
        cut=None if end else 0.99,
        headers={"Content-Length": None, "Transfer-Encoding": "chunked"},
    )


def test_chunks(server, cache):
    server.replies = [chunked([BODY[:9]], end=False), chunked([b"a", b"bc"])]
    assert fetch(server).read_bytes() == b"abc"
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "kind", ["text/html", "Text/HTML; charset=utf-8", "application/xhtml+xml"]
)
def test_a_web_page_is_no_checkpoint(server, cache, kind):
    page = Reply(body=b"<html>log in</html>", headers={"Content-Type": kind})
    server.replies = [page]
    refused(server, cache, "web page")
    assert names(cache) == []
    # Nor is what came before it lost.
    server.replies = [Reply(cut=0.5), page]
    refused(server, cache, "web page")
    assert fetch(server).read_bytes() == BODY
    assert server.seen[-1].range is not None


JUNK = {
    "empty": b"",
    "html": b"<html>log in</html>",
    "doctype": b"\xef\xbb\xbf \r\n<!DOCTYPE html><p>log in",
    "xml": b"\n\n<?XML version='1.0'?><Error/>",
    "utf-16": "\ufeff<HTML>log in".encode("utf-16-le"),
}


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize("chunks", [False, True])
def test_junk_is_neither_kept_nor_recorded(server, cache, kind, chunks):
    body, octets = JUNK[kind], {"Content-Type": "application/octet-stream"}
    reply = Reply(status=200, body=body, headers=octets)
    if chunks:
        reply = chunked([body[i : i + 1] for i in range(len(body))])
    server.replies = [reply]
    refused(server, cache, "empty" if kind == "empty" else "web page")
    assert names(cache) == []
    assert len(server.seen) == 1
    assert fetch(server).read_bytes() == BODY


@pytest.mark.parametrize("kind", JUNK)
def test_junk_put_there_by_hand_is_not_recorded(server, cache, kind):
    cache.mkdir()
    (cache / NAME).write_bytes(JUNK[kind])
    with pytest.raises(errors.DownloadError, match="Delete it to download"):
        fetch(server)
    assert names(cache) == [NAME]


def test_what_begins_like_a_web_page_later_is_none(server, cache):
    for index, body in enumerate((b"x<html>", b"<", b"\0\0", b"<htm")):
        path = f"/{index}.npz"
        server.bodies[path] = body
        assert fetch(server, path).read_bytes() == body


def test_encoded_files_are_refused(server, cache):
    server.replies = [Reply(headers={"Content-Encoding": "gzip"})]
    refused(server, cache, "encoded: gzip")


def test_secrets_are_sent_but_not_told(server, cache):
    host = server.url.removeprefix("http://")
    secret = f"http://user:hush@{host}{PATH}?token=hush2"
    server.replies = [Reply(status=403)]
    with pytest.raises(errors.DownloadError) as denied:
        cached_download.cached(secret)
    server.replies = [Reply(cut=0.5), Reply(cut=0.0)]
    with pytest.raises(errors.DownloadError) as cut:
        cached_download.cached(secret, attempts=2, backoff=0.01)
    with file_server.running() as other:
        gone = secret.replace(host, other.url.removeprefix("http://"))
    with pytest.raises(errors.DownloadError) as absent:
        cached_download.cached(gone, name="b", attempts=1)
    with pytest.raises(errors.DownloadError) as malformed:
        cached_download.cached("http://user:hush@h:hush2/x.npz")
    path = cached_download.cached(secret)
    assert "token=hush2" in server.seen[-1].target
    assert server.seen[-1].headers["authorization"].startswith("Basic ")
    told = [
        part.read_text() for part in cache.iterdir() if part.suffix == ".json"
    ]
    for caught in (denied, cut, absent, malformed):
        error = caught.value
        while error is not None:
            told += [str(error), repr(error)]
            error = error.__cause__
    assert "hush" not in "".join(told)
    assert path.read_bytes() == BODY


CLIENT = """
import signal
import sys
from bit_tf import cached_download
# A shell's background job ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
print(cached_download.cached(sys.argv[1], timeout=60))
"""


@contextlib.contextmanager
def client(server):
    """Another process that downloads the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url + PATH],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def test_two_processes_download_once(server, cache):
    go = threading.Event()
    server.replies = [Reply(hold=go)]
    with client(server) as one:
        wait_for(lambda: server.seen)
        with client(server) as two:
            assert "Waiting for another process" in two.stderr.readline()
            go.set()
            for process in (one, two):
                stdout, stderr = process.communicate(timeout=60)
                assert stdout == f"{cache / NAME}\n", stderr
    assert (cache / NAME).read_bytes() == BODY
    assert len(server.seen) == 1


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_is_continued(server, cache, kind):
    server.replies = [Reply(cut=0.5, stall=60)]
    with client(server) as process:
        part = cache / f"{NAME}.part"
        wait_for(lambda: part.exists() and part.stat().st_size >= 1_000_000)
        process.send_signal(kind)
        assert process.wait(60) != 0
    assert names(cache) == [f"{NAME}.part", f"{NAME}.part.json"]
    length = part.stat().st_size
    assert BODY.startswith(part.read_bytes())
    assert fetch(server).read_bytes() == BODY
    assert server.seen[-1].range == f"bytes={length}-"
    assert server.seen[-1].sent == len(BODY) - length
    record = json.loads((cache / f"{NAME}.json").read_text())
    assert record["sha256"] == sha256(BODY)


def test_a_killed_process_left_all_of_it(server, cache, monkeypatch):
    """Nothing is missing but the record and the name."""
    with monkeypatch.context() as patch:
        patch.setattr(cached_download, "_finish", None)
        with pytest.raises(TypeError):
            fetch(server)
    assert names(cache) == [f"{NAME}.part", f"{NAME}.part.json"]
    assert fetch(server).read_bytes() == BODY
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "http://elsewhere/weights.npz"),
        ("validator", None),
        ("total", 7),
        ("total", "many"),
        ("total", True),
        ("nested", None),
        (None, None),
    ],
)
def test_a_part_that_does_not_fit_is_dropped(server, cache, key, value):
    cache.mkdir()
    note = {"url": server.url + PATH, "validator": '"1"', "total": len(BODY)}
    text = json.dumps(note | {key: value}) if key else "{damaged"
    if key == "nested":
        text = "[" * 100_000
    (cache / f"{NAME}.part").write_bytes(b"not the beginning")
    (cache / f"{NAME}.part.json").write_text(text)
    assert fetch(server).read_bytes() == BODY
    assert server.seen[0].range is None


def test_a_part_of_another_size_is_dropped(server, cache):
    cache.mkdir()
    etag = f'"{len(BODY)}"'
    note = {"url": server.url + PATH, "validator": etag, "total": 10**7}
    (cache / f"{NAME}.part").write_bytes(BODY[:100])
    (cache / f"{NAME}.part.json").write_text(json.dumps(note))
    assert fetch(server, size=len(BODY)).read_bytes() == BODY
    assert server.seen[0].range is None


def test_a_part_of_an_older_file(server, cache):
    cache.mkdir()
    note = {"url": server.url + PATH, "validator": '"1"', "total": None}
    (cache / f"{NAME}.part").write_bytes(b"of another age")
    (cache / f"{NAME}.part.json").write_text(json.dumps(note))
    assert fetch(server).read_bytes() == BODY
    assert server.seen[0].headers["if-range"] == '"1"'
    assert server.seen[0].sent == len(BODY)


def test_room_is_made_sure_of_before(server, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused(server, cache, "1000 are free")
    assert f"{len(BODY)} more bytes in {cache}" in str(error)
    assert "BIT_TF_CACHE" in str(error)
    assert f"{NAME}.part" not in names(cache)


def test_a_disk_that_fills_up(server, cache, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 1_000_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path, mode):
        return Full(path, mode) if mode == "ab" else open(path, mode)

    monkeypatch.setattr(cached_download, "open", opened, raising=False)
    error = refused(server, cache, "No space left")
    assert str(cache) in str(error)
    assert "BIT_TF_CACHE" in str(error)
    assert error.__cause__.errno == errno.ENOSPC
    length = (cache / f"{NAME}.part").stat().st_size
    assert f"{len(BODY) - length} more bytes" in str(error)
    monkeypatch.undo()
    assert fetch(server, directory=cache).read_bytes() == BODY
    assert server.seen[-1].range == f"bytes={length}-"


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="mounts a file system; run as root on Linux",
)
def test_a_real_small_disk(server, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mounts here ({mounted.stderr.strip()}); run as root")
    try:
        refused(server, disk, "are free", directory=disk)
        # A server that does not say how long the file is.
        server.replies = [chunked([BODY])]
        error = refused(server, disk, "No space left", directory=disk)
        assert error.__cause__.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_server_gives_other_bytes_later(server, cache):
    path = fetch(server)
    path.unlink()
    old = BODY
    new = server.bodies[PATH] = b"new" * 1000
    with pytest.raises(errors.DownloadError, match="stays the same") as caught:
        fetch(server)
    assert names(cache) == [f"{NAME}.json"]
    for told in (sha256(old), sha256(new), f"{NAME}.json", str(len(new))):
        assert told in str(caught.value)
    server.bodies[PATH] = old
    assert fetch(server).read_bytes() == old
    path.unlink()
    (cache / f"{NAME}.json").unlink()
    server.bodies[PATH] = new
    assert fetch(server).read_bytes() == new


@pytest.mark.parametrize("damage", ["flip", "truncate", "append"])
def test_a_damaged_file_in_the_cache(server, cache, damage):
    path = fetch(server)
    data = bytearray(BODY)
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-1:]
    else:
        data += b"\0"
    path.write_bytes(data)
    with pytest.raises(errors.DownloadError, match="changed or damaged"):
        fetch(server)
    assert len(server.seen) == 1
    path.unlink()
    assert fetch(server).read_bytes() == BODY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"url": 1}',
        "{",
        "[" * 100_000,
        '{"url": null, "size": true, "sha256": ""}',
    ],
    ids=range(7),
)
def test_a_damaged_record(server, cache, text):
    fetch(server)
    (cache / f"{NAME}.json").write_text(text)
    with pytest.raises(errors.DownloadError, match="A record in the cache is"):
        fetch(server)


def test_a_file_put_there_by_hand(server, cache):
    cache.mkdir()
    (cache / NAME).write_bytes(b"by hand")
    with pytest.raises(errors.DownloadError, match=r"has 5 bytes.* with 7,"):
        fetch(server, size=5)
    assert names(cache) == [NAME]
    for _ in range(2):
        assert fetch(server, size=7).read_bytes() == b"by hand"
    assert server.seen == []
    record = json.loads((cache / f"{NAME}.json").read_text())
    assert record["sha256"] == sha256(b"by hand")
    assert record["url"] is None
    with pytest.raises(errors.DownloadError, match="has 8 bytes"):
        fetch(server, size=8)
    (cache / NAME).write_bytes(b"by hanD")
    with pytest.raises(errors.DownloadError, match="changed or damaged"):
        fetch(server)


def test_a_cache_that_cannot_be(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BIT_TF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.DownloadError, match="BIT_TF_CACHE") as caught:
        fetch(server)
    assert str(tmp_path / "file") in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert server.seen == []


def test_a_cache_of_somebody_else(server, tmp_path):
    """A full cache may be read-only; an empty one may not."""
    shared, empty = tmp_path / "shared", tmp_path / "empty"
    fetch(server, directory=shared)
    empty.mkdir()
    root = os.geteuid() == 0
    for parent in tmp_path.parents if root else []:
        # pytest's own folders.
        if parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o755)
    for folder in (tmp_path, shared, empty):
        folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(errors.DownloadError, match="denied") as caught:
            fetch(server, directory=empty)
        assert fetch(server, directory=shared).read_bytes() == BODY
    finally:
        if root:
            os.seteuid(0)
        for folder in (tmp_path, shared, empty):
            folder.chmod(0o755)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert len(server.seen) == 1


def test_an_interrupt_keeps_what_arrived(server, cache, monkeypatch):
    read = requests.Response.iter_content

    def interrupted(response, size):
        yield next(read(response, size))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(requests.Response, "iter_content", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(server)
    length = (cache / f"{NAME}.part").stat().st_size
    assert length > 0
    assert NAME not in names(cache)
    assert fetch(server).read_bytes() == BODY
    assert server.seen[-1].range == f"bytes={length}-"


def test_progress_is_shown_on_a_terminal_only(server, cache, monkeypatch):
    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    server.replies = [Reply(cut=0.5)]
    fetch(server)
    assert f"{NAME}: 100%" in terminal.text
    assert "2.86M/2.86M" in terminal.text
