"""The pages in Chromium: with and without script, small, light and dark."""

import contextlib
import functools
import http.server
import shutil
import threading

import helpers
import pytest
import sample_site

from hub_export import description, pages

CHROMIUM = shutil.which("chromium")
HOW = (
    "apt-get install chromium; pip install playwright; "
    "then pytest tests/test_pages_browser.py"
)
if CHROMIUM is None:
    pytest.skip(f"no chromium; {HOW}", allow_module_level=True)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason=f"no playwright; {HOW}"
)

PREFIX = "some/prefix"
VERSION = "google/bit/m-r50x1/ilsvrc2012_classification/1"
EVERY_KIND = (
    "",
    "google/",
    "google/bit/",
    "google/bit/m-r50x1/",
    "google/bit/m-r50x1/10/",
    f"{VERSION}/",
    "me/flowers_classification/1/",
    "other/net/1/",
)
# Contrast of every text with what lies behind it, as WCAG 2 defines it.
CONTRAST = """() => {
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[0-9.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const { rgb, a } = parse(getComputedStyle(e).backgroundColor);
      if (a === 1) return rgb;
    }
    return null;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility()) continue;
    const back = behind(element);
    const front = parse(getComputedStyle(element).color).rgb;
    const [low, high] = [back && luminance(back), luminance(front)].sort(
      (a, b) => a - b);
    found.push({
      tag: element.tagName, front: front.join(), back: back && back.join(),
      ratio: back ? (high + 0.05) / (low + 0.05) : 0,
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rendered files, on disk below a prefix."""
    root = tmp_path_factory.mktemp("site")
    sample_site.write(sample_site.files(), root / PREFIX)
    return root


@pytest.fixture(scope="module")
def site(folder):
    """The address of the repository's root on a server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{PREFIX}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, site):
    """Opens pages; a complaint or a request elsewhere fails the test."""
    complaints = []
    with contextlib.ExitStack() as stack:

        def opened(**options):
            context = stack.enter_context(
                contextlib.closing(browser.new_context(**options))
            )
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "request",
                lambda request: (
                    request.url.startswith((site, "data:,", "file:"))
                    or complaints.append(request.url)
                ),
            )
            page.on(
                "response",
                lambda response: (
                    response.status < 400
                    or complaints.append(f"{response.status} {response.url}")
                ),
            )
            return page

        yield opened
    assert complaints == []


def shown(page):
    """Handles in the table of models, as visible and ordered."""
    return page.locator("tbody tr:visible th a").all_inner_texts()


def test_without_script(open_page, site):
    page = open_page(java_script_enabled=False)
    page.goto(site)
    assert len(shown(page)) == 14
    assert not page.locator("form").is_visible()
    assert not page.get_by_role("button").count()
    page.get_by_role("link", name=VERSION).click()
    assert page.url == f"{site}{VERSION}/index.html"
    text = page.locator("main").inner_text()
    for fact in ("25,549,352", "[n, 1000]", "apache-2.0", "2" * 64, "softmax"):
        assert fact in text
    assert "https://HOST/google/bit/m-r50x1" in text
    assert "HOST stands for the address" in text
    assert not page.locator(".filter").is_visible()
    names = page.locator("#labels pre")
    assert not names.is_visible()
    page.get_by_text("1000 class names").click()
    assert names.is_visible()
    assert "0  n01440764  tench, Tinca tinca" in names.inner_text()
    page.get_by_text("2 files inside").click()
    assert page.get_by_text("variables/variables.index").is_visible()


def test_search_filters_and_order(open_page, site):
    page = open_page()
    page.goto(site)
    status = page.locator(".filters [role=status]")
    assert len(shown(page)) == 14
    assert status.inner_text() == "14 models"
    page.get_by_label("Architecture").select_option("R50x1")
    assert len(shown(page)) == 4
    assert status.inner_text() == "4 of 14 models"
    options = page.get_by_label("Architecture").locator("option")
    assert "R101x1 (2)" in options.all_inner_texts()
    heads = page.get_by_label("Head").locator("option").all_inner_texts()
    assert heads == ["any", "classification (2)", "features (2)"]
    page.get_by_label("Head").select_option("features")
    assert "R101x1 (1)" in options.all_inner_texts()
    assert len(shown(page)) == 2
    page.get_by_label("Search").fill("  ANIMAL   bit ")
    assert shown(page) == ["google/experts/bit/r50x1/in21k/animal/1"]
    assert page.evaluate("location.hash") == (
        "#q=++ANIMAL+++bit+&architecture=R50x1&head=features"
    )
    page.get_by_role("button", name="Clear").click()
    assert len(shown(page)) == 14
    assert page.url == site
    page.get_by_label("Publisher").select_option("google")
    page.get_by_label("Archive").select_option("over 1 GB")
    page.get_by_label("Order").select_option("-size")
    large = shown(page)
    assert large[0] == "google/bit/m-r152x4/ilsvrc2012_classification/1"
    page.get_by_label("Order").select_option("size")
    assert shown(page) == large[::-1]
    page.get_by_label("Order").select_option("")
    assert shown(page) == sorted(large)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Order").select_option("-published")
    assert shown(page)[0] == "google/bit/m-r50x1/10"
    page.get_by_role("button", name="Clear").click()
    # What a row says in any of its columns is found.
    page.get_by_label("Search").fill("r101X3 1000 classes")
    assert shown(page) == ["google/bit/m-r101x3/ilsvrc2012_classification/1"]
    page.get_by_label("Search").fill("2027-01-02")
    assert shown(page) == ["google/bit/m-r50x1/10"]
    page.get_by_label("Search").fill("nothing like this")
    assert shown(page) == []
    assert status.inner_text() == "0 of 14 models"


def test_a_filtered_view_can_be_shared(open_page, site):
    page = open_page()
    page.goto(f"{site}#q=bit&architecture=R101x3&sort=-size")
    assert shown(page) == [
        "google/bit/m-r101x3/ilsvrc2012_classification/1",
        "google/bit/m-r101x3/1",
    ]
    assert page.get_by_label("Search").input_value() == "bit"
    page.evaluate("location.hash = '#head=features&architecture=none&sort=x'")
    page.wait_for_function("document.querySelector('#filter-q').value === ''")
    assert len(shown(page)) == 6
    page.get_by_role("link", name="google/bit/m-r101x1/1").click()
    page.wait_for_url("**/m-r101x1/1/index.html")
    page.go_back()
    page.wait_for_function("location.hash.startsWith('#head=features')")
    assert len(shown(page)) == 6
    page.goto(f"{site}google/#architecture=R50x3")
    assert len(shown(page)) == 2
    assert page.get_by_label("Publisher").count() == 0


def test_many_models_stay_quick(open_page, site, folder):
    entries = [
        helpers.make_entry(f"many/bit/model-{n}/1", 0, name)
        for n in range(400)
        for name in [("R50x1", "R50x3", "R101x1")[n % 3]]
    ]
    sample_site.write(pages.repository_files(entries), folder / PREFIX / "many")
    page = open_page()
    page.goto(f"{site}many/")
    assert len(shown(page)) == 400
    took = page.evaluate(
        """() => {
          const field = document.querySelector("#filter-q");
          const begin = performance.now();
          for (const text of ["m", "mo", "mod", "model-3", "model-39", "r50"]) {
            field.value = text;
            field.dispatchEvent(new Event("input", { bubbles: true }));
            document.body.offsetHeight;
          }
          return (performance.now() - begin) / 6;
        }"""
    )
    assert took < 200, f"{took} ms a letter"


def test_labels_can_be_searched(open_page, site):
    page = open_page()
    page.goto(f"{site}google/bit/m-r50x1/imagenet21k_classification/1/")
    page.get_by_text("21843 class names").click()
    names = page.locator("#labels pre")
    status = page.locator("#labels [role=status]")
    before = names.text_content().strip("\n")
    assert before.count("\n") == 21842
    assert status.inner_text() == "21843"
    took = page.evaluate(
        """async () => {
          const field = document.querySelector("#label-filter");
          const frame = () => new Promise(requestAnimationFrame);
          const begin = performance.now();
          for (const text of ["t", "te", "tench, ti"]) {
            field.value = text;
            field.dispatchEvent(new Event("input"));
            await frame();
          }
          return (performance.now() - begin) / 3;
        }"""
    )
    assert took < 500, f"{took} ms a letter"
    lines = names.text_content().split("\n")
    assert len(lines) == 1
    assert "tench, Tinca tinca" in lines[0]
    assert status.inner_text() == "1 of 21843"
    page.get_by_label("Find a class").fill("")
    page.wait_for_function(
        "document.querySelector('#labels [role=status]').textContent"
        " === '21843'"
    )
    assert names.text_content() == before
    page.goto(f"{site}me/flowers_classification/1/")
    page.get_by_text("3 class names").click()
    page.get_by_label("Find a class").fill("<script> 2")
    page.wait_for_function(
        "document.querySelector('#labels [role=status]').textContent"
        " === '1 of 3'"
    )
    assert names.text_content().startswith("2  <script>alert(1)</script>")
    assert page.locator("pre script").count() == 0


@pytest.mark.parametrize("how", ["clipboard", "selection"])
def test_copy(open_page, site, how):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    if how == "selection":
        page.add_init_script(
            "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
            "document.addEventListener('copy', () => {"
            "  window.copied = document.activeElement.value;"
            "});"
        )
    page.goto(f"{site}{VERSION}/")
    buttons = page.get_by_role("button", name="Copy: ")
    assert buttons.count() == 8
    entry = helpers.make_entry(VERSION, 1000)
    wanted = description.examples(entry, site)
    for index in (0, 6):
        button = buttons.nth(index)
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "(index) => document.querySelectorAll('.code button')[index]"
            ".textContent === 'Copied'",
            arg=index,
        )
        copied = page.evaluate(
            "navigator.clipboard ? navigator.clipboard.readText()"
            " : window.copied"
        )
        assert copied == wanted[index].code
    assert page.locator("textarea").count() == 0


def test_host_is_the_page_s_own(open_page, site):
    page = open_page()
    for path, handle in (
        ("google/bit/m-r50x1/", "google/bit/m-r50x1/10"),
        (f"{VERSION}/", VERSION),
        (f"{VERSION}/index.html?x=1#use", VERSION),
    ):
        page.goto(site + path)
        text = page.locator("main").inner_text()
        assert f'"{site}{handle}"' in text
        assert "HOST" not in text


def test_from_a_disk(open_page, folder):
    page = open_page()
    page.goto((folder / PREFIX / "index.html").as_uri())
    page.get_by_label("Head").select_option("features")
    assert len(shown(page)) == 6
    page.get_by_role("link", name="google/bit/m-r50x1/10").click()
    page.wait_for_url("**/m-r50x1/10/index.html*")
    text = page.locator("main").inner_text()
    assert '"https://HOST/google/bit/m-r50x1/10"' in text
    assert "HOST stands for the address" in text
    colour = "getComputedStyle(document.body).maxWidth"
    assert page.evaluate(colour) != "none"
    page.get_by_role("navigation").get_by_role("link", name="google").click()
    page.wait_for_url("**/google/index.html")


def test_on_a_phone(open_page, site):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    for path in EVERY_KIND:
        page.goto(site + path)
        page.evaluate(
            "document.querySelectorAll('details').forEach((e) => e.open = true)"
        )
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, path
        cut = page.evaluate(
            """[...document.querySelectorAll("main *")].filter((e) =>
              e.checkVisibility() && !e.closest("pre, .scroll, .models thead")
              && e.getBoundingClientRect().right > 361).map((e) => e.outerHTML)
            """
        )
        assert cut == [], path


@pytest.mark.parametrize("path", ["", f"{VERSION}/", "google/bit/m-r50x1/"])
def test_light_and_dark(open_page, site, path):
    seen = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.goto(site + path)
        page.evaluate(
            "document.querySelectorAll('details').forEach((e) => e.open = true)"
        )
        found = page.evaluate(CONTRAST)
        assert {"A", "H1", "CODE", "P"} <= {row["tag"] for row in found}
        weak = [row for row in found if row["ratio"] < 4.5]
        assert weak == []
        seen[scheme] = {(row["front"], row["back"]) for row in found}
    assert not seen["light"] & seen["dark"]


def test_keyboard(open_page, site):
    page = open_page()
    page.goto(site)
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="To the content")
    assert skip.evaluate("(e) => e === document.activeElement")
    assert skip.bounding_box()["x"] >= 0
    page.get_by_label("Search").focus()
    for name in ("Architecture", "Head", "Publisher", "Archive", "Order"):
        page.keyboard.press("Tab")
        field = page.get_by_label(name, exact=True)
        assert field.evaluate("(e) => e === document.activeElement")
        outline = field.evaluate("(e) => getComputedStyle(e).outlineStyle")
        assert outline == "solid"
