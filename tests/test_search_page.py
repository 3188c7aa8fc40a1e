"""Pages of what was found: what they show, and what they must not do."""

import base64
import dataclasses
import html
import http.server
import io
import os
import re
import shutil
import tarfile
import threading

import helpers
import pytest
from PIL import Image

from bit_tf import embedding_table, presets, search_page
from bit_tf.embedding_table import Row
from bit_tf.index import Hit
from bit_tf.near_duplicates import Group, Member

CHROMIUM = shutil.which("chromium")
HOW = (
    "apt-get install chromium; pip install playwright; "
    "then pytest tests/test_search_page.py"
)
FACTS = embedding_table.Facts(
    model="some/model",
    model_hash="a" * 64,
    preset=presets.PRESETS["tfhub"],
    version="0.1",
    dim=4,
)
HOSTILE = '<script>alert(1)</script>" onerror="x\' & \u202e\x1b[2J.png'
PICTURE = re.compile(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"')


def hit(source, score=0.5, **cells):
    cells = {"width": 30, "height": 20} | cells
    return Hit(score, Row(id=cells.pop("id", source), source=source, **cells))


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    source = f"{tmp_path}/fifo.tar#x.png"
    page = search_page.results(source, None, [hit(source)], FACTS)
    assert not PICTURE.search(page)


def picture_bytes(height=300, width=400, seed=0):
    file = io.BytesIO()
    pixels = helpers.random_images(1, height, width, seed)[0]
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Picture files, of which one is damaged, and an archive."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        data = picture_bytes(80 + 60 * number, 300, number)
        (path / f"photo{number}.png").write_bytes(data)
    (path / "damaged.png").write_bytes(data[:500])
    (path / "shy.png").write_bytes(data)
    with tarfile.open(path / "shard.tar", "w") as archive:
        for name in ("a.png", "b/c.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_pictures_scores_and_reasons(folder):
    hits = [
        hit(f"{folder}/photo0.png", 0.98765, names=["cat"], scores=[0.75]),
        hit(f"{folder}/damaged.png", 0.9, id="some id"),
        hit(f"{folder}/none.png", -0.25),
        hit(f"{folder}/shard.tar#b/c.png", 0.1),
        hit(f"{folder}/shard.tar#none.png", 0.1),
        hit("https://127.0.0.1:1/x.png", 0.0),
    ]
    page = search_page.results(
        "query.png", picture_bytes(), hits, FACTS, where="width > 3"
    )
    assert len(PICTURE.findall(page)) == 3
    for text in (
        "0.9877",
        "-0.2500",
        "0.750 cat",
        "some id",
        "30 × 20",
        "some/model",
        "tfhub",
        "--fetch",
        "width &gt; 3",
        "none.png",
    ):
        assert text in page
    assert page.count('class="empty"') == 4
    # Nothing is fetched or run by who looks at it.
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert len(page) < 100_000


def test_thumbnails_are_small_and_upright(folder):
    page = search_page.results("q", picture_bytes(300, 900), [], FACTS)
    (text,) = re.findall(r"base64,([^\"]+)", page)
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert (image.format, image.size) == ("JPEG", (160, 53))
    assert "No picture was found" in page
    # Small ones stay as they are, and the thinnest have a pixel.
    for size, expected in (((7, 5), (5, 7)), ((1, 4000), (160, 1))):
        page = search_page.results("q", picture_bytes(*size), [], FACTS)
        (text,) = re.findall(r"base64,([^\"]+)", page)
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert image.size == expected


@pytest.mark.parametrize("where", ["query", "source", "id", "name", "facts"])
def test_hostile_text_is_text(where):
    cells = {"names": ["cat"], "scores": [0.5], "id": "id"}
    source, query, facts = "source", "query", FACTS
    if where == "query":
        query = HOSTILE
    elif where == "source":
        source = HOSTILE
    elif where == "id":
        cells["id"] = HOSTILE
    elif where == "name":
        cells["names"] = [HOSTILE]
    else:
        facts = dataclasses.replace(FACTS, model=HOSTILE)
    page = search_page.results(
        query, picture_bytes(), [hit(source, **cells)], facts, where=None
    )
    assert "<script" not in page
    assert 'onerror="' not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page
    page.encode("utf-8")


@pytest.mark.parametrize(
    "source", ["javascript:alert(1)", "data:text/html,x", "HTTPS://a/<b>"]
)
def test_only_web_addresses_are_links(source):
    page = search_page.results("q", picture_bytes(), [hit(source)], FACTS)
    links = [html.unescape(link) for link in re.findall(r'href="(.*?)"', page)]
    assert links == [source] * source.startswith("HTTPS")


def test_urls_are_fetched_when_asked(folder):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture_bytes())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            source = f"http://127.0.0.1:{server.server_port}/a.png"
            for fetch in (False, True):
                page = search_page.results(
                    source, None, [hit(source)], FACTS, fetch=fetch
                )
                assert asked == ["/a.png"] * fetch
                assert len(PICTURE.findall(page)) == 2 * fetch
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_a_dataset_that_is_not_there(folder):
    hits = [hit("tfds:nosuch_dataset:1.0.0/train/17"), hit(f"{folder}/shy.png")]
    page = search_page.results("q", picture_bytes(), hits, FACTS)
    assert len(PICTURE.findall(page)) == 2
    assert page.count('class="empty"') == 1
    assert "nosuch_dataset" in page


def test_groups(folder):
    def member(number, same_file=False):
        return Member(0.97, same_file, hit(f"{folder}/photo{number}.png").row)

    groups = [
        Group([member(0, True), member(1, True), *[member(2)] * 30]),
        Group([member(3), member(4)]),
    ]
    page = search_page.duplicates(groups, FACTS, 0.95)
    assert "32 pictures" in page
    assert "8 more are not shown" in page
    assert page.count("same file") == 2
    assert len(PICTURE.findall(page)) == 26
    page = search_page.duplicates(groups[1:] * 103, FACTS, 0.95)
    assert len(PICTURE.findall(page)) == 200
    assert "3 smaller groups" in page
    assert "No near-duplicates" in search_page.duplicates([], FACTS, 0.95)


def test_printable():
    assert search_page.printable("a\x1b[1m\n\u202e é") == (
        "a\\x1b[1m\\n\\u202e é"
    )


@pytest.mark.skipif(CHROMIUM is None, reason=f"no chromium; {HOW}")
def test_in_a_browser(folder, tmp_path):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason=f"no playwright; {HOW}"
    )
    long = "https://example.org/" + "a-very-long-name-" * 9 + ".jpg"
    hits = [
        *(
            hit(
                f"{folder}/photo{number}.png",
                0.9 - number / 10,
                names=["Egyptian cat", "tabby", "tiger cat"],
                scores=[0.5, 0.25, 0.125],
            )
            for number in range(6)
        ),
        hit(f"{folder}/damaged.png", 0.2),
        hit(long, 0.1),
        hit(HOSTILE, 0.0),
    ]
    path = tmp_path / "page.html"
    page = search_page.results(
        f"{folder}/photo0.png", None, hits, FACTS, where="width > 10"
    )
    path.write_text(page, "utf-8")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        for width, scheme in ((320, "dark"), (1200, "light")):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )
            opened = context.new_page()
            opened.on("console", lambda m: complaints.append(m.text))
            opened.on("pageerror", lambda e: complaints.append(str(e)))
            opened.on("dialog", lambda d: complaints.append(d.message))
            opened.on("request", lambda r: complaints.append(r.url[:90]))
            opened.goto(path.as_uri())
            # Nothing sticks out at the side, and all pictures are drawn.
            assert opened.evaluate(
                "document.documentElement.scrollWidth <= innerWidth"
            )
            drawn = opened.evaluate(
                "[...document.images].map((i) => [i.naturalWidth, i.height])"
            )
            assert len(drawn) == 7
            assert all(0 < w <= 160 and 0 < h <= 160 for w, h in drawn)
            back = opened.evaluate(
                "getComputedStyle(document.body).backgroundColor"
            )
            bright = sum(map(int, re.findall(r"\d+", back)[:3])) > 384
            assert bright == (scheme == "light")
            opened.screenshot(
                path=tmp_path / f"{scheme}{width}.png", full_page=True
            )
            context.close()
        browser.close()
    requests = [url for url in complaints if not url.startswith("data:")]
    assert requests == [path.as_uri()] * 2
