import html.parser
import itertools
import os
import posixpath
import re
import subprocess
import sys

import helpers
import pytest
import sample_site
from sample_site import HOSTILE, replaced

from bit_tf import errors, labels
from hub_export import description, documentation, documentation_check, pages


class Page(html.parser.HTMLParser):
    """Text, links and elements of a page.

    Attributes:
      tags: [(name, {attribute: value}), …] in the order of the page.
      text: what is between tags.
      scripts: what is inside of script elements.
    """

    VOID = ("meta", "link", "input", "wbr", "br", "img", "hr")

    def __init__(self, data):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.scripts, self._open = [], "", "", []
        self.feed(data.decode("utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def files():
    return sample_site.files()


@pytest.fixture(scope="module")
def parsed(files):
    return {
        path: Page(data)
        for path, data in files.items()
        if path.endswith(".html")
    }


def test_files_of_a_repository(files):
    rendered = pages.repository_files(sample_site.entries())
    assert set(rendered) <= set(files)
    for path in (
        "index.html",
        "google/index.html",
        "google/bit/index.html",
        "google/bit/m-r50x1/index.html",
        "google/bit/m-r50x1/ilsvrc2012_classification/index.html",
        "google/experts/bit/r50x1/index.html",
        "assets/style.css",
        "assets/script.js",
        "assets/docs/google/google.md",
        "assets/docs/google/models/bit/m-r50x1/1.md",
        "assets/docs/google/models/bit/m-r50x1/10.md",
        "assets/docs/google/collections/bit/1.md",
    ):
        assert path in rendered
    assert "google/bit/m-r50x1/1/index.html" not in rendered
    assert not any(path.endswith(".json") for path in rendered)
    assert all(isinstance(data, bytes) for data in files.values())


def test_documentation_follows_the_format(files):
    checked = [path for path in files if path.startswith("assets/docs/")]
    assert len(checked) > 20
    for path in checked:
        text = files[path].decode("utf-8")
        documentation_check.check(text, path.removeprefix("assets/docs/"))
    for entry in sample_site.entries():
        path = f"assets/docs/{documentation.path_of(entry.handle)}"
        assert files[f"{entry.handle}/card.md"] == files[path]


def test_links_lead_to_files(files, parsed):
    archives = {f"{entry.handle}.tar.gz" for entry in sample_site.entries()}
    for path, page in parsed.items():
        folder = posixpath.dirname(path)
        links = [tag["href"] for tag in page.all("a") + page.all("link")]
        links += [tag["src"] for tag in page.all("script")]
        for link in links:
            if link.startswith(("#", "data:,")):
                continue
            if link.startswith("https://"):
                assert "/assets/" not in link
                continue
            assert not re.match(r"[a-z]+:|/", link), link
            target = posixpath.normpath(posixpath.join(folder, link))
            assert (
                target in files
                or target in archives
                or target.endswith(sample_site.WRITTEN_ELSEWHERE)
            ), f"{path}: {link}"
        anchors = {tag["id"] for _, tag in page.tags if "id" in tag}
        assert {link[1:] for link in links if link[0] == "#"} <= anchors


def test_other_hosts_are_linked_to_only_by_citations(parsed):
    for path, page in parsed.items():
        found = {
            tag["href"]
            for tag in page.all("a")
            if tag["href"].startswith("https:")
        }
        assert found <= {
            "https://arxiv.org/abs/1912.11370",
            "https://example.org/p?a&b",
        }, path


def test_every_page_is_whole(parsed):
    for path, page in parsed.items():
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("h1")) == len(page.all("main")) == 1
        names = [tag.get("name") for tag in page.all("meta")]
        assert "viewport" in names
        policy = [
            tag["content"]
            for tag in page.all("meta")
            if tag.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy == [pages.CONTENT_SECURITY_POLICY]
        identifiers = [tag["id"] for _, tag in page.tags if "id" in tag]
        assert len(identifiers) == len(set(identifiers)), path
        labelled = {tag["for"] for tag in page.all("label")}
        for control in page.all("input") + page.all("select"):
            assert control["id"] in labelled
        levels = [
            int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)
        ]
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_nothing_inline(parsed):
    for page in parsed.values():
        assert page.scripts.strip() == ""
        for tag, attributes in page.tags:
            assert tag not in (
                "style",
                "img",
                "iframe",
                "object",
                "base",
                "i",
                "b",
            )
            assert "style" not in attributes
            assert not any(name.startswith("on") for name in attributes)


def test_text_of_users_is_only_text(files, parsed):
    page = parsed["me/flowers_classification/1/index.html"]
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")
    assert page.text.count(shown) >= 8
    data = files["me/flowers_classification/1/index.html"]
    assert b"alert(1)</script>" not in data
    assert "\u202e".encode() not in data
    assert b"\x1b" not in data
    assert b"{{ 7*7 }}" in data
    assert [
        tag["href"] for tag in page.all("a") if ":" in tag.get("href", "")
    ] == ["https://example.org/p?a&b"]
    assert shown in parsed["index.html"].text


def test_surrogates_and_all_control_characters():
    text = "".join(map(chr, [*range(32), 0x7F, 0x85, 0x2028, 0xD800, 0xFFFE]))
    entry = helpers.make_entry("me/net/1", 1, "testing", "custom")
    entry = replaced(entry, "publication", description=text)
    # "\t\n\r" are in no label.
    name = re.sub("[\t\n\r\ud800]", "", text)
    found = pages.version_files(entry, (labels.Label("", name),))
    Page(found["index.html"])
    documentation_check.check(found["card.md"].decode(), "me/models/net/1.md")


@pytest.mark.parametrize(
    "entry", sample_site.entries(), ids=lambda entry: str(entry.handle)
)
def test_facts_of_a_version(entry, parsed):
    page = parsed[f"{entry.handle}/index.html"]
    card = entry.card
    texts = [
        str(entry.handle),
        description.summary(entry),
        card.architecture,
        f"{card.params:,}",
        card.input,
        card.output,
        f"{entry.archive.size:,} bytes",
        f"{entry.unpacked_size:,} bytes",
        description.file_size(entry.archive.size),
        entry.archive.sha256,
        entry.provenance.source,
        entry.provenance.sha256,
        entry.published,
        "[n, height, width, 3]",
        f"[n, {entry.graph.outputs}]",
        'model.signatures["image_feature_vector"](images)',
        f"licence {entry.publication.license or 'not stated'}",
        *(file.sha256 for file in entry.files),
        *(example.code for example in description.examples(entry)),
        *card.citations,
    ]
    whole = " ".join(page.text.split())
    for text in texts:
        text = " ".join(description.clean(text).split())
        assert text in whole, text
    if entry.graph.relative_error is None:
        assert "none inside this SavedModel" in whole
    else:
        assert "relative error 2.5e-07, allowed 0.0001" in whole
    names = sample_site.names(entry)
    lines = [
        line for line in page.text.split("\n") if re.match(r"\d+  \S", line)
    ]
    assert len(lines) == len(names or ())
    for index, label in enumerate(names or ()):
        shown = description.clean(label.name)
        identifier = f"{label.id}  " if label.id else ""
        assert lines[index] == f"{index}  {identifier}{shown}"
    assert ("has no class names" in whole) == (
        bool(card.num_classes) and not names
    )
    assert any(tag.get("id") == "labels" for _, tag in page.tags) == bool(names)


def test_the_archive_that_is_checked_is_the_one_that_is_downloaded(parsed):
    for entry in sample_site.entries():
        page = parsed[f"{entry.handle}/index.html"]
        (name,) = {
            posixpath.basename(tag["href"])
            for tag in page.all("a")
            if tag["href"].endswith(".tar.gz")
        }
        check = f"echo '{entry.archive.sha256}  {name}' | sha256sum --check"
        said = f"the link {name} saves, in its folder: {check}"
        assert " ".join(said.split()) in page.words


def test_preset(parsed):
    text = parsed["google/bit/m-r50x1/10/index.html"].words
    assert "resized to 480 × 480 pixels, bilinear, not antialiased" in text
    assert "tf.image.resize(image, [480, 480])" in text
    assert "--preset 'big_transfer eval'" in text
    text = parsed["google/bit/m-r50x1/1/index.html"].words
    assert "not known; any size is taken" in text


def test_versions_of_a_model_newest_first(parsed):
    page = parsed["google/bit/m-r50x1/index.html"]
    text = page.words
    assert "Call the newest, version 10" in text
    assert "https://HOST/google/bit/m-r50x1/10" in text
    order = [
        tag["href"]
        for tag in page.all("a")
        if re.fullmatch(r"\d+/index.html", tag["href"])
    ]
    assert order == [f"{n}/index.html" for n in (10, 10, 9, 1)]
    assert "Models below this one" in text
    assert "imagenet21k_classification" in text
    other = parsed["me/flowers_classification/index.html"].words
    assert "Models below this one" not in other


def rows(page):
    return [tag for tag in page.all("tr") if "data-architecture" in tag]


def test_front_page(parsed):
    page = parsed["index.html"]
    assert len(rows(page)) == 14
    assert "14 models in 16 versions" in page.words
    assert "m-r50x1/9" not in page.text
    for text in ("R50x1 (4)", "features (6)", "classification (8)", "me (1)"):
        assert text in page.text
    for text in ("up to 100 MB (5)", "100 MB to 1 GB (", "over 1 GB ("):
        assert text in page.text
    sizes = [int(row["data-bytes"]) for row in rows(page)]
    groups = [row["data-size"] for row in rows(page)]
    assert {
        group: max(
            size for size, of in zip(sizes, groups, strict=True) if of == group
        )
        for group in groups
    }["up to 100 MB"] <= 100_000_000
    assert [form.get("hidden", "no") for form in page.all("form")] == [None]


def test_folders(parsed):
    assert len(rows(parsed["google/index.html"])) == 12
    assert len(rows(parsed["google/bit/index.html"])) == 11
    assert len(rows(parsed["google/experts/bit/index.html"])) == 1
    assert "Publisher with 12 models" in parsed["google/index.html"].words
    assert "Collection with 11 models" in parsed["google/bit/index.html"].words
    assert (
        "Folder with 1 model" in parsed["google/experts/bit/index.html"].words
    )


def test_a_model_and_a_collection_of_one_name():
    entries = [helpers.make_entry(f"me/{name}/1") for name in ("bit", "bit/a")]
    found = pages.repository_files(entries)
    text = Page(found["me/bit/index.html"]).words
    assert "Versions" in text
    assert "me/bit/a/1" in text


def test_an_empty_repository():
    found = pages.repository_files([], title="Mine & yours")
    assert set(found) == {"index.html", "assets/style.css", "assets/script.js"}
    page = Page(found["index.html"])
    assert "Mine & yours" in page.text
    assert "hub-export publish" in page.text


def test_address_of_the_repository():
    entry = helpers.make_entry("me/net/1")
    for url in ("https://example.org/hub", "https://example.org/hub/"):
        data = pages.version_files(entry, None, url)["index.html"]
        page = Page(data)
        assert '"https://example.org/hub/me/net/1"' in page.text
        assert "https://example.org/hub/me/net/1.tar.gz" in page.text
        assert "HOST" not in page.text
    assert (
        "HOST stands for"
        in Page(pages.version_files(entry, None)["index.html"]).words
    )
    for url in ("example.org", 'https://x/"><script>', 3):
        with pytest.raises(errors.HandleError):
            pages.version_files(entry, None, url)
        with pytest.raises(errors.HandleError):
            pages.repository_files([entry], url)


def test_contradictions_are_not_published():
    entry = helpers.make_entry("me/net/1", 10, "testing", "custom")
    names = tuple(labels.Label("", str(n)) for n in range(10))
    pages.version_files(entry, names)
    for wrong, some in (
        (entry, names[:9]),
        (entry, None),
        (replaced(entry, "card", params=1), names),
        (replaced(entry, "card", task="image-feature-vector"), names),
    ):
        with pytest.raises(errors.VerificationError, match="me/net/1"):
            pages.version_files(wrong, some)
    # What is published stays listed, whatever later rules say of it.
    pages.repository_files([replaced(entry, "card", task="other")])
    with pytest.raises(
        errors.HandleError, match="me/net/1: params must be int"
    ):
        pages.repository_files([entry, replaced(entry, "card", params="1")])


def test_order_does_not_matter(files):
    backwards = pages.repository_files(reversed(sample_site.entries()))
    assert {path: files[path] for path in backwards} == backwards
    assert list(backwards) == list(
        pages.repository_files(sample_site.entries())
    )


def test_same_bytes_in_every_process(files, tmp_path):
    code = (
        "import hashlib, sample_site\n"
        "for path, data in sorted(sample_site.files().items()):\n"
        "    print(path, hashlib.sha256(data).hexdigest())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == len(files)


def test_rendering_loads_nothing_heavy():
    code = (
        "import sys\nfrom hub_export import pages\npages.repository_files([])\n"
        "print(*{'tensorflow', 'keras'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == ""


PYTHON = ("hub-load", "keras-2", "encoder", "keras-3")


@pytest.mark.slow
@pytest.mark.parametrize("export", ["small_export", "features_export"])
def test_examples_run(export, request, tmp_path, photos):
    """The code of the pages, as copied, on a real model."""
    directory = request.getfixturevalue(export)
    classes = 10 if export == "small_export" else 0
    entry = helpers.make_entry("me/net/1", classes, "testing", None)
    os.link(photos[0], tmp_path / "photo.jpg")
    for example in description.examples(entry):
        if example.language == "python":
            assert example.name in PYTHON
            code = example.code.replace("https://HOST/me/net/1", str(directory))
            if example.name.startswith("keras"):
                code += (
                    "\nimport numpy\n"
                    "zeros = numpy.zeros([2, 64, 64, 3], 'float32')\n"
                    "assert model(zeros).shape == (2, 10)\n"
                    "assert len(model.trainable_variables) > 40\n"
                )
            command = [sys.executable, "-W", "ignore", "-c", code]
        elif example.name == "curl":
            continue
        else:
            program, *arguments = example.code.replace(
                "https://HOST/me/net/1", str(directory)
            ).split()
            command = [sys.executable, "-m", program.replace("-", "_")]
            command += arguments
        process = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.returncode == 0, (example.name, process.stderr)
