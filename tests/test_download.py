"""read_url against a server that misbehaves on a real port."""

import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback

import pytest

from bit_tf import download
from bit_tf.download import read_url
from bit_tf.errors import ImageError, ImageFetchError, ImageTooLargeError

BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self):
        self.close_connection = True
        self.server.seen.append((self.path, dict(self.headers)))
        with contextlib.suppress(OSError):
            self.answer(self.path.partition("?")[0])

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def answer(self, path):
        if path.startswith("/ok"):
            self.head(200, Content_Length=len(BODY))
            self.wfile.write(BODY)
        elif path == "/until-close":
            self.head(200)
            self.wfile.write(BODY)
        elif path in ("/chunked", "/chunked-cut"):
            self.head(200, Transfer_Encoding="chunked")
            for start in range(0, len(BODY), 1024):
                part = BODY[start : start + 1024]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if path == "/chunked":
                self.wfile.write(b"0\r\n\r\n")
        elif path == "/endless":
            self.head(200, Transfer_Encoding="chunked")
            while True:
                self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        elif path == "/declared-huge":
            self.head(200, Content_Length=10**12)
        elif path == "/truncated":
            self.head(200, Content_Length=len(BODY) + 7)
            self.wfile.write(BODY)
        elif path == "/gzip":
            self.head(200, Content_Encoding="gzip", Content_Length=3)
            self.wfile.write(b"abc")
        elif path == "/drip-body":
            self.head(200, Content_Length=len(BODY))
            self.drip(b"x")
        elif path == "/drip-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip(b"x")
        elif path == "/silent":
            self.server.done.wait(5)
        elif path == "/garbage":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        elif path.startswith("/status/"):
            self.head(int(path.rpartition("/")[2]), Content_Length=0)
        elif path == "/loop":
            self.head(302, Location="/loop", Content_Length=0)
        elif path.startswith("/hops/"):
            left = int(path.rpartition("/")[2])
            target = f"/hops/{left - 1}" if left else "/ok"
            self.head(301, Location=target, Content_Length=0)
        elif path == "/redirect-endless":
            self.head(302, Location="/ok")
            while True:
                self.wfile.write(b"x" * 1024)
        elif path == "/redirect":
            code, _, target = self.path.partition("?")[2].partition(",")
            self.head(int(code), Location=target, Content_Length=0)
        else:
            self.head(404, Content_Length=0)

    def drip(self, byte):
        while not self.server.done.wait(0.05):
            self.wfile.write(byte)
            self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def finish_request(self, request, client_address):
        if self.context:
            request = self.context.wrap_socket(request, server_side=True)
        with request:
            super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def running(context=None):
    server = Server(("127.0.0.1", 0), Handler)
    server.context = context
    server.seen = []
    server.done = threading.Event()
    server.at = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.done.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def module_server():
    with running() as server:
        yield server


@pytest.fixture
def server(module_server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    module_server.seen.clear()
    return module_server


@pytest.mark.parametrize(
    "path",
    [
        "/ok",
        "/ok?a=b&c=%20d#part",
        "/until-close",
        "/chunked",
        "/hops/4",
        "/redirect?302,/ok",
        "/redirect?303,/ok",
        "/redirect?307,ok",
        "/redirect?308,//127.0.0.1:{port}/ok",
        "/redirect?301,http://127.0.0.1:{port}/ok",
        "/redirect-endless",
    ],
)
def test_a_body_is_read_whole(server, path):
    url = server.at + path.format(port=server.server_port)
    assert read_url(url, timeout=5) == BODY


def test_the_request_names_itself_and_asks_for_plain_bytes(server):
    read_url(server.at + "/ok/é?q=ü#not-sent", timeout=5)
    path, headers = server.seen[0]
    assert path == "/ok/%C3%A9?q=%C3%BC"
    assert headers["User-Agent"] == "bit-tf"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/status/404", ImageFetchError, r"status 200.*404 Not Found"),
        ("/status/500", ImageFetchError, r"500 Internal Server Error"),
        ("/status/204", ImageFetchError, r"204 No Content"),
        ("/status/206", ImageFetchError, r"206 Partial Content"),
        ("/status/302", ImageFetchError, r"302 Found"),
        ("/loop", ImageFetchError, r"At most 5 redirects"),
        ("/hops/5", ImageFetchError, r"At most 5 redirects"),
        ("/redirect?302,ftp://h/a.png", ImageFetchError, r"Only http.*ftp:"),
        ("/redirect?302,file:///etc/passwd", ImageFetchError, r"Only http"),
        ("/redirect?302,data:,x", ImageFetchError, r"Only http"),
        ("/redirect?302,http://[::1", ImageFetchError, r"Only http|has the"),
        ("/redirect?302,http://", ImageFetchError, r"At most 5|has the"),
        ("/truncated", ImageFetchError, r"whole.*10240 of 10247 bytes"),
        ("/chunked-cut", ImageFetchError, r"IncompleteRead"),
        ("/declared-huge", ImageTooLargeError, r"at most 67108864 bytes"),
        ("/endless", ImageTooLargeError, r"at most 67108864 bytes"),
        ("/gzip", ImageFetchError, r"content encoding.*gzip"),
        ("/garbage", ImageFetchError, r"BadStatusLine|this is not HTTP"),
    ],
)
def test_an_answer_that_is_no_picture_is_an_error(server, path, error, words):
    with pytest.raises(error, match=words):
        read_url(server.at + path, timeout=5)


@pytest.mark.parametrize("path", ["/ok", "/chunked", "/until-close"])
def test_max_bytes_is_the_largest_body(server, path):
    assert read_url(server.at + path, max_bytes=len(BODY)) == BODY
    with pytest.raises(ImageTooLargeError, match=f"{len(BODY) - 1} bytes"):
        read_url(server.at + path, max_bytes=len(BODY) - 1)


@pytest.mark.parametrize("path", ["/drip-body", "/drip-head", "/silent"])
def test_the_whole_transfer_has_a_deadline(server, path):
    started = time.monotonic()
    with pytest.raises(ImageFetchError, match=r"within 0\.4 seconds"):
        read_url(server.at + path, timeout=0.4)
    assert 0.3 < time.monotonic() - started < 2.5


def test_a_refused_connection_names_the_address():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(ImageFetchError, match=rf"refused.*127.0.0.1:{port}"):
        read_url(f"http://127.0.0.1:{port}/a.png", timeout=2)


def test_tls_is_not_spoken_with_a_plain_server(server):
    url = server.at.replace("http:", "https:")
    with pytest.raises(ImageFetchError, match="SSL"):
        read_url(url + "/ok", timeout=3)
    assert server.seen == []


def test_tls_is_spoken_and_certificates_are_checked(
    server, tmp_path, monkeypatch
):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl for a certificate: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = (
        f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        f"-addext subjectAltName=IP:127.0.0.1 "
        f"-keyout {key.name} -out {certificate.name}"
    )
    subprocess.run(
        [openssl, *options.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running(context) as secure:
        url = secure.at.replace("http:", "https:") + "/ok"
        with pytest.raises(ImageFetchError, match="CERTIFICATE_VERIFY_FAILED"):
            read_url(url, timeout=3)
        assert secure.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert read_url(url, timeout=3) == BODY
        with pytest.raises(ImageFetchError, match="public addresses"):
            read_url(url, timeout=3, public_only=True)
        drip = url.replace("/ok", "/drip-body")
        with pytest.raises(ImageFetchError, match=r"within 0\.4 seconds"):
            read_url(drip, timeout=0.4)
        assert len(secure.seen) == 2


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "has the form"),
        ("http:///a.png", "has the form"),
        ("http://:80/a.png", "has the form"),
        ("http://host/a b.png", "has the form"),
        ("http://ho st/a.png", "has the form"),
        ("http://host/a\r\nX-Evil: 1", "has the form"),
        ("http://host/\x00", "has the form"),
        ("http://host\\@evil/", "has the form"),
        ("http://host:port/", "has the form"),
        ("http://host:99999/", "has the form"),
        ("http://[::1", "has the form"),
        ("http://a..b/", "has the form"),
        ("http://" + "a" * 70 + "/", "has the form"),
        ("", "Only http"),
        ("host/a.png", "Only http"),
        ("ftp://host/a.png", "Only http"),
        ("file:///etc/passwd", "Only http"),
        ("data:,abc", "Only http"),
        ("gopher://host/", "Only http"),
        ("http:host/a.png", "Only http"),
    ],
)
def test_a_malformed_url_never_leaves(url, words, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a host was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    with pytest.raises(ImageFetchError, match=words):
        read_url(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.1",
        "localhost",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "10.0.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "224.0.0.1",
        "255.255.255.255",
    ],
)
def test_public_only_refuses_inner_hosts(server, host):
    with pytest.raises(ImageFetchError, match="public addresses"):
        read_url(f"http://{host}:{server.server_port}/ok", public_only=True)
    assert server.seen == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("93.184.216.34", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("192.168.0.1", False),
        ("172.16.0.1", False),
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False),
        ("239.1.1.1", False),
        ("::ffff:192.168.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert download._is_public(address) is public


def names(monkeypatch, table):
    """Lets host names resolve to the addresses of a table."""

    def look_up(host, port, *args, **kwargs):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in table[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_public_only_judges_what_a_name_resolves_to(server, monkeypatch):
    names(monkeypatch, {"inner.test": ["8.8.8.8", "127.0.0.1"]})
    url = f"http://inner.test:{server.server_port}/ok"
    with pytest.raises(ImageFetchError, match=r"public.*127\.0\.0\.1"):
        read_url(url, public_only=True)
    assert server.seen == []


def connecting_to(monkeypatch, server):
    """Lets every socket end at the local server, wherever it was sent."""

    class Socket(socket.socket):
        def connect(self, address):
            super().connect(("127.0.0.1", server.server_port))

    monkeypatch.setattr(socket, "socket", Socket)


def test_public_only_judges_the_connected_socket(server, monkeypatch):
    names(monkeypatch, {"rebound.test": ["8.8.8.8"]})
    connecting_to(monkeypatch, server)
    assert read_url("http://rebound.test/ok", timeout=3) == BODY
    server.seen.clear()
    for scheme in ("http", "https"):
        with pytest.raises(ImageFetchError, match=r"public.*127\.0\.0\.1"):
            read_url(f"{scheme}://rebound.test/ok", public_only=True)
    assert server.seen == []


def test_public_only_judges_every_redirect(server, monkeypatch):
    names(monkeypatch, {"outer.test": ["8.8.8.8"], "127.0.0.1": ["127.0.0.1"]})
    connecting_to(monkeypatch, server)
    monkeypatch.setattr(
        socket.socket, "getpeername", lambda self: ("8.8.8.8", 80)
    )
    url = f"http://outer.test/redirect?302,{server.at}/ok"
    assert read_url(url, timeout=3) == BODY
    server.seen.clear()
    assert read_url("http://outer.test/ok", public_only=True) == BODY
    server.seen.clear()
    with pytest.raises(ImageFetchError, match=r"public.*127\.0\.0\.1"):
        read_url(url, timeout=3, public_only=True)
    assert [path.partition("?")[0] for path, _ in server.seen] == ["/redirect"]


def test_only_public_transfers_ignore_the_proxy(server, monkeypatch):
    names(
        monkeypatch,
        {"outer.test": ["8.8.8.8"], "127.0.0.1": ["127.0.0.1"]},
    )
    monkeypatch.setenv("http_proxy", server.at)
    with pytest.raises(ImageFetchError, match="404"):
        read_url("http://outer.test/ok", timeout=3)
    assert server.seen[0][0] == "http://outer.test/ok"
    monkeypatch.setenv("http_proxy", "http://never-looked-up.test")
    connecting_to(monkeypatch, server)
    server.seen.clear()
    with pytest.raises(ImageFetchError, match="public addresses"):
        read_url("http://outer.test/ok", timeout=3, public_only=True)
    assert server.seen == []


def test_a_proxy_that_is_not_http_is_an_error(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(ImageFetchError, match="socks5"):
        read_url(server.at + "/ok", timeout=3)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@127.0.0.1:{port}/status/404",
        "http://user:s3cret@127.0.0.1:{port}/loop",
        "http://user:s3cret@127.0.0.1:{port}/truncated",
        "http://127.0.0.1:{port}/status/500?token=s3cret",
        "http://user:s3cret@127.0.0.1:{port}x/ok",
        "http://user:s3cret@127.0.0.1:1/ok",
        "http://user:pa/s3cret@127.0.0.1/",
        "http://user:s3cret[@127.0.0.1/",
        "http://user:s3cret@/",
        "http://user:s3cret@host/a b",
        "ftp://user:s3cret@host/a",
    ],
)
def test_credentials_stay_out_of_messages(server, url):
    with pytest.raises(ImageError) as caught:
        read_url(url.format(port=server.server_port), timeout=3)
    text = "".join(traceback.format_exception_only(caught.value))
    error = caught.value
    while error := error.__cause__ or (
        None if error.__suppress_context__ else error.__context__
    ):
        text += repr(error)
    assert "s3cret" not in text


def test_credentials_go_to_their_own_host_alone(server):
    with running() as other:
        at = server.at.replace("://", "://us%40r:p%C3%A9@")
        read_url(f"{at}/redirect?302,/redirect?302,{other.at}/ok", timeout=3)
        sent = [headers.get("Authorization") for _, headers in server.seen]
        assert sent == ["Basic dXNAcjpww6k="] * 2
        assert len(other.seen) == 1
        assert "Authorization" not in other.seen[0][1]
