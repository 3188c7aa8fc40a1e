import re

import helpers
import pytest
import sample_site
from sample_site import replaced

from bit_tf import errors
from hub_export import description, documentation, documentation_check


@pytest.mark.parametrize("url", [None, "https://example.org/hub"])
@pytest.mark.parametrize("entry", sample_site.kinds())
def test_model_pages_follow_the_format(entry, url):
    text = documentation.model_page(entry, url)
    documentation_check.check(text, documentation.path_of(entry.handle))
    base = f"{url}/" if url else ""
    assert f"<!-- asset-path: {base}{entry.handle}.tar.gz -->" in text
    assert (description.HOST in text) == (url is None)
    assert entry.archive.sha256 in text
    assert f"{entry.card.params:,}" in text
    for facts in (
        description.model_facts,
        description.input_facts,
        description.size_facts,
        description.provenance_facts,
        description.parity_facts,
    ):
        for name, _ in facts(entry):
            assert text.count(f"\n| {name} | ") == 1


def test_what_no_tag_has_is_said_in_the_text():
    entry = helpers.make_entry("me/net/1", 5, "R152x2", None)
    entry = replaced(
        entry, "publication", license="cc-by-4.0", datasets=("my_photos",)
    )
    head, body = documentation.model_page(entry).split("## Overview")
    assert re.findall(r"<!-- ([a-z-]+):", head) == [
        "asset-path",
        "fine-tunable",
        "format",
        "task",
    ]
    assert "| Architecture | R152x2 |" in body
    assert "| Licence | cc-by-4.0 |" in body
    assert "| Trained on | my_photos |" in body
    entry = replaced(entry, "publication", license=None)
    assert "| Licence | not stated |" in documentation.model_page(entry)


def test_publishers_and_collections():
    one, two = (helpers.make_entry(f"google/bit/m-r50x1/{n}") for n in (2, 10))
    three = helpers.make_entry("google/bit/a_b/ilsvrc2012_classification/1", 7)
    for url in (None, "https://example.org"):
        text = documentation.publisher_page("google", [two, one, three], url)
        documentation_check.check(text, documentation.publisher_path("google"))
        assert "google/bit/m-r50x1/10]" in text
        assert "m-r50x1/2" not in text
        text = documentation.collection_page("google", "bit", [one, three], url)
        documentation_check.check(
            text, documentation.collection_path("google", "bit")
        )
        assert "2 models of google" in text
        assert "<!-- task: image-classification -->" in text
        assert "<!-- task: image-feature-vector -->" in text
    assert "(https://example.org/google/bit/m-r50x1/2)" in text
    with pytest.raises(errors.HandleError, match="links to a model"):
        documentation_check.check(
            documentation.collection_page("google", "bit", []),
            documentation.collection_path("google", "bit"),
        )


HOSTILE = [
    "x\n<!-- license: mit -->",
    "x\n\n# Module a/b/1",
    "# heading",
    "<script>alert(1)</script> <!-- x",
    "-->",
    "[a](javascript:alert(1)) ![i](http://x/y.png)",
    "`` ` `` ~~~ | \\| a\\",
    "1. list",
    "- list",
    "=====",
    "\x00\x1b[31m\u202e\ud800",
    "&lt;b&gt;&#60;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_users_is_only_text(text):
    entry = replaced(
        helpers.make_entry("me/net/1"), "publication", description=text
    )
    entry = replaced(entry, "publication", datasets=(text,))
    entry = replaced(entry, "provenance", source=text, notes=(text,))
    entry = replaced(entry, "card", citations=(text,))
    page = documentation.model_page(entry)
    documentation_check.check(page, "me/models/net/1.md")
    page.encode()
    calm = documentation.model_page(
        replaced(entry, "publication", description="x", datasets=())
    )
    for mark in ("<!--", "\n#", "-->", "<!-- license"):
        assert page.count(mark) == calm.count(mark)
    body = re.sub(r"(?m)^<!-- [a-z-]+: \S+ -->$", "", page)
    assert not re.search(r"(?<!\\)<|\x1b|\x00|\u202e", body)
    assert not re.search(r"(?<!\\)[\[\]]", re.sub(r"(?s)```.*?```", "", body))
    markdown = pytest.importorskip(
        "markdown_it", reason="no markdown-it-py; pip install markdown-it-py"
    )
    html = markdown.MarkdownIt("commonmark").enable("table").render(page)
    assert html.count("<h1>") == 1
    assert not re.search(r"<(script|img|b|a)\b", html)
