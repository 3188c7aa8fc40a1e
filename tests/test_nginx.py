"""The configuration that this package ships, with Debian's nginx."""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import repositories

from benchmarks import serving
from bit_tf import errors
from hub_export import nginx

MODEL = "google/bit/m-r50x1"
FIRST = f"{MODEL}/1"
QUERY = "?tf-hub-format=compressed"
CANARY = b"canary-outside-of-the-site"

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="no nginx; apt-get install nginx-light, then pytest "
    "tests/test_nginx.py",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def site(folder):
    """A static site with a blank in its path, and secrets beside it."""
    model = folder / "model"
    (model / "variables").mkdir(parents=True)
    (model / "assets").mkdir()
    (model / "saved_model.pb").write_bytes(b"graph" * 100)
    (model / "assets" / "page.html").write_text("<script>alert(1)</script>")
    (model / "variables" / "variables.index").write_bytes(
        np.random.default_rng(0).bytes(300_000)
    )
    root = repositories.make_repository(
        folder / "repository", {FIRST: model, f"{MODEL}/2": model}
    )
    (folder / "the sites").mkdir()
    out = repositories.make_site(root, folder / "the sites" / "public")
    for path in (
        folder / "the sites" / "secret.txt",
        out / ".secret",
        out / "google" / ".secret.txt",
        out / FIRST / ".secret",
        out / FIRST / "model" / ".secret",
        out / "assets" / ".secret",
        out / "assets" / ".git" / "1" / "secret",
        folder / "the sites" / "public.tar.gz",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CANARY)
    (out / "link.txt").symlink_to("../secret.txt")
    (out / "folder").symlink_to("..")
    (out / MODEL / "8.tar.gz").symlink_to(folder / "the sites" / "secret.txt")
    return out


@pytest.fixture(scope="module")
def port(site, folder):
    with serving.nginx(site, folder / "prefix") as port:
        yield port


@pytest.fixture(scope="module")
def bucket_port(site, folder):
    with serving.nginx(
        site, folder / "other", bucket="gs://models/hub/"
    ) as port:
        yield port


def ask(port, path, method="GET", **headers):
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        found = {k.lower(): v for k, v in answer.getheaders()}
        return answer.status, found, answer.read()


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        f"/{FIRST}{QUERY}",
        f"/{FIRST}/{QUERY}",
        f"/{FIRST}?a=b&tf-hub-format=compressed",
        f"/{FIRST}.tar.gz",
        f"/{FIRST}.tar.gz{QUERY}",
    ],
)
def test_an_archive_at_every_spelling(port, site, path):
    status, headers, body = ask(port, path, Accept_Encoding="gzip, br")
    assert status == 200
    assert body == (site / f"{FIRST}.tar.gz").read_bytes()
    assert headers["content-type"] == "application/gzip"
    assert "content-encoding" not in headers
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["accept-ranges"] == "bytes"
    assert headers["server"] == "nginx"
    assert ask(port, path, "HEAD")[::2] == (200, b"")
    status, _, part = ask(port, path, Range="bytes=10-19")
    assert (status, part) == (206, body[10:20])
    status, _, _ = ask(port, path, If_None_Match=headers["etag"])
    assert status == 304


@needs_nginx
def test_every_file_of_the_site(port, site):
    asked = 0
    for folder, _, names in os.walk(site):
        for name in names:
            file = os.path.join(folder, name)
            path = os.path.relpath(file, site)
            if os.path.islink(file) or "/." in f"/{path}":
                continue
            asked += 1
            status, headers, body = ask(port, f"/{path}")
            assert status == 200
            with open(file, "rb") as stream:
                assert body == stream.read()
            assert headers["x-content-type-options"] == "nosniff"
            kept = "immutable" in headers["cache-control"]
            assert kept == bool(re.search(r"/[12](/|\.tar\.gz)", path))
    assert asked > 20


@needs_nginx
def test_pages(port, site):
    for path in ("/", f"/{FIRST}/", f"/{MODEL}/", "/google/bit/", "/google/"):
        status, headers, body = ask(port, path)
        assert status == 200
        assert body == (site / path.strip("/") / "index.html").read_bytes()
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        if path != "/":
            status, headers, _ = ask(port, path.rstrip("/"))
            assert status == 301
            assert headers["location"] == path


@needs_nginx
@pytest.mark.parametrize(
    ("path", "type"),
    [
        ("index.json", "application/json"),
        ("assets/style.css", "text/css; charset=utf-8"),
        ("assets/script.js", "text/javascript; charset=utf-8"),
        (f"{FIRST}/card.md", "text/markdown; charset=utf-8"),
        (f"{FIRST}/model/saved_model.pb", "application/octet-stream"),
        (f"{FIRST}/model/assets/page.html", "application/octet-stream"),
    ],
)
def test_types(port, path, type):
    _, headers, _ = ask(port, f"/{path}")
    assert headers["content-type"] == type
    if "/model/" in path:
        assert headers["content-security-policy"] == "sandbox"


@needs_nginx
@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        (f"/{FIRST}?tf-hub-format=zip", 400, b"compressed or uncompressed"),
        (f"/{FIRST}?tf-hub-format=uncompressed", 406, b"compressed"),
        (f"/{MODEL}/9{QUERY}", 404, b"has a version"),
        (f"/{MODEL}{QUERY}", 404, b"has a version"),
        (f"/{QUERY}", 404, b"has a version"),
        (f"/{MODEL}/9", 404, b"has a version"),
        ("/missing.html", 404, b"has a version"),
        (f"/{FIRST}/model/", 404, b"has a version"),
        ("/.secret", 404, b"has a version"),
        ("/google/.secret.txt", 404, b"has a version"),
        ("/%2esecret", 404, b"has a version"),
        (f"/{FIRST}/.secret", 404, b"has a version"),
        (f"/{FIRST}/model/.secret", 404, b"has a version"),
        ("/assets/.secret", 404, b"has a version"),
        ("/assets/.git/1/secret", 404, b"has a version"),
        ("/link.txt", 404, b"has a version"),
        ("/folder/secret.txt", 404, b"has a version"),
        (f"/{MODEL}/8.tar.gz", 404, b"has a version"),
        (f"/{MODEL}/8{QUERY}", 404, b"has a version"),
        ("/..%2fsecret.txt", 400, b""),
        ("/../secret.txt", 400, b""),
        ("/google/..%2f..%2fsecret.txt", 400, b""),
        ("/index.json%00", 400, b""),
    ],
)
def test_refusals(port, path, status, text):
    found, headers, body = ask(port, path)
    assert found == status
    assert text in body
    assert CANARY not in body
    assert "immutable" not in headers.get("cache-control", "")
    if text:
        assert headers["content-type"].startswith("text/plain")


@needs_nginx
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_read_only(port, method):
    status, headers, _ = ask(port, f"/{FIRST}{QUERY}", method)
    assert status == 405
    assert headers["allow"] == "GET, HEAD"


@needs_nginx
def test_a_bucket(bucket_port, site):
    path = f"/{FIRST}?tf-hub-format=uncompressed"
    status, headers, body = ask(bucket_port, path)
    assert status == 303
    assert body == f"gs://models/hub/{FIRST}/model".encode()
    assert "location" not in headers
    for missing in (f"/{MODEL}/9", f"/{MODEL}"):
        path = f"{missing}?tf-hub-format=uncompressed"
        assert ask(bucket_port, path)[0] == 404
    assert ask(bucket_port, f"/{FIRST}{QUERY}")[0] == 200


@needs_nginx
def test_health(port, site):
    assert ask(port, "/healthz")[::2] == (200, b"ok\n")
    moved = (site / "index.json").rename(site / "moved.json")
    try:
        assert ask(port, "/healthz")[0] == 503
    finally:
        moved.rename(site / "index.json")


@needs_nginx
@pytest.mark.slow
def test_tensorflow_hub(features_export, tmp_path):
    """hub.load and hub.KerasLayer, by a plain handle."""
    import tensorflow as tf

    root = repositories.make_repository(
        tmp_path / "repository", {FIRST: features_export}
    )
    site = repositories.make_site(root, tmp_path / "site")
    with serving.nginx(site, tmp_path / "prefix", bucket="gs://name") as port:
        url = f"http://127.0.0.1:{port}/"
        outputs, address = repositories.loaded_in_fresh_process(
            tmp_path, [f"{url}{FIRST}", f"uncompressed {url}{FIRST}"]
        )
    assert address[""] == f"gs://name/{FIRST}/model"
    model = tf.saved_model.load(str(features_export))
    expected = model(tf.constant(repositories.pixels())).numpy()
    for output in outputs.values():
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@needs_nginx
def test_a_whole_file(port, site):
    """What the benchmark downloads by."""
    body = (site / f"{FIRST}.tar.gz").read_bytes()
    assert ask(port, f"/{FIRST}.tar.gz")[2] == body
    assert hashlib.sha256(body).hexdigest() in (
        site / FIRST / "entry.json"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("root", "options"),
    [
        ('/srv/"; include /etc/passwd; #', {}),
        ("/srv/$host", {}),
        ("/srv/a\nb", {}),
        ("/srv/a\\b", {}),
        ("/srv", {"server_name": "a; root /"}),
        ("/srv", {"server_name": ""}),
        ("/srv", {"server_name": "a\n"}),
        ("/srv", {"listen": "80; root /"}),
        ("/srv", {"listen": ""}),
        ("/srv", {"listen": "80\n"}),
        ("/srv", {"bucket": 'gs://a"b'}),
        ("/srv", {"bucket": "https://a"}),
    ],
)
def test_nothing_is_injected(root, options):
    with pytest.raises(errors.HandleError, match="Received"):
        nginx.nginx_configuration(root, **options)


def test_the_extra_is_not_needed():
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['starlette', 'uvicorn', 'h11'])\n"
        "from hub_export import nginx\n"
        "print(nginx.nginx_configuration('/srv/hub'))"
    )
    text = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert 'root "/srv/hub";' in text


def test_what_is_written():
    text = nginx.nginx_configuration(
        "/srv/hub",
        server_name="hub.example.org www.example.org",
        listen="[::]:443 ssl",
        bucket="gs://models",
    )
    assert 'root "/srv/hub";' in text
    assert "server_name hub.example.org www.example.org;" in text
    assert "listen [::]:443 ssl;" in text
    assert 'set $hub_bucket "gs://models";' in text
    assert "%{" not in text
