import re

import pytest

from bit_tf import errors
from hub_export import documentation_check

# The tags that pages of feature vectors, of both kinds of classification, of
# experts and of collections had, in these orders.
FEATURES = """\
# Module google/bit/m-r50x1/1

Vectors of pictures.

<!-- fine-tunable: true -->
<!-- asset-path: legacy -->
<!-- format: saved_model_2 -->
<!-- task: image-feature-vector -->
<!-- network-architecture: resnet50-v2 -->


## Overview

Text with `code`.

```python
# A comment, no heading.
x = "<!-- license: none -->"
```
"""
CLASSIFICATION = """\
# Module google/bit/m-r50x3/imagenet21k_classification/1
Many labels for
a picture.

<!-- dataset: imagenet-21k -->
<!-- dataset: imagenet-ilsvrc-2012-cls -->
<!-- asset-path: https://example.org/models/1.tar.gz -->
<!-- fine-tunable: false -->
<!-- format: saved_model_2 -->
<!-- license: apache-2.0 -->
<!-- task: image-classification -->
<!-- network-architecture: resnet50x3-v2 -->
<!-- colab: https://colab.research.google.com/github/x/y.ipynb -->

## Overview
"""
COLLECTION = """\
# Collection google/experts/bit/1

Vectors of pictures.

<!-- task: image-feature-vector -->
<!-- task: image-classification -->
<!-- dataset: imagenet-21k -->
<!-- language: en -->

## Overview

<!-- (https://tfhub.dev/google/experts/bit/r50x1/in21k/animal) -->
"""
PUBLISHER = """\
# Publisher google
Somebody

[![Icon URL]](https://example.org/logo.png)

## example.org
"""
FEATURES_PATH = "google/models/bit/m-r50x1/1.md"
COLLECTION_PATH = "google/collections/experts/bit/1.md"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (FEATURES, FEATURES_PATH),
        (
            CLASSIFICATION,
            "google/models/bit/m-r50x3/imagenet21k_classification/1.md",
        ),
        (COLLECTION, COLLECTION_PATH),
        (PUBLISHER, "google/google.md"),
    ],
)
def test_published_forms_are_right(text, path):
    documentation_check.check(text, path)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("# Module ", "# Modul ", 1, "the first line is"),
        ("# Module google", "# Module Google", 1, "the first line is"),
        ("m-r50x1/1\n", "m-r50x1\n", 1, "the first line is"),
        ("bit/m-r50x1/1", "bit/m-r50x1/2", 1, r"is google/.*/2\.md, not"),
        ("bit/m-r50x1/1", "bit/.m/1", 1, "begins with a dot"),
        ("bit/m-r50x1/1", "bit/12/1", 1, "no number but for the version"),
        ("Vectors of pictures.\n", "", 2, "a short description"),
        ("Vectors of pictures.", "x" * 701, 3, "up to 700 characters, not 701"),
        ("<!-- task:", "text\n<!-- task:", 8, "of the form"),
        ("true -->", "true ->", 5, "of the form"),
        ("true -->", "true --> ", 5, "of the form"),
        ("true -->", "true --> <!-- x: y -->", 5, "of the form"),
        ("<!-- format: saved_model_2 -->", "<!-- format -->", 7, "of the form"),
        ("<!-- format: saved_model_2 -->\n", "", 4, "must have the tag format"),
        (
            "<!-- asset-path: legacy -->\n",
            "",
            4,
            "must have the tag asset-path",
        ),
        (
            "<!-- fine-tunable: true -->\n",
            "",
            4,
            "must have the tag fine-tunable",
        ),
        (
            "<!-- task: image-feature-vector -->\n",
            "",
            4,
            "must have the tag task",
        ),
        ("<!-- format:", "<!-- formt:", 7, "no tag 'formt'; it has format"),
        ("<!-- format:", "<!-- demo: x -->\n<!-- format:", 7, "no tag 'demo'"),
        ("legacy", "model.zip", 6, r"asset-path ends in \.tar\.gz"),
        ("legacy", "a b.tar.gz", 6, r"asset-path ends in \.tar\.gz"),
        ("true", "yes", 5, "fine-tunable has no value 'yes'"),
        ("saved_model_2", "onnx", 7, "format has no value 'onnx'"),
        ("image-feature-vector", "image-vector", 8, "perhaps image-feature-v"),
        ("resnet50-v2", "resnet50", 9, "network-architecture has no value"),
        ("## Overview", "## Overview\n<!-- task: x -->", 13, "after the first"),
        ("Text with", "<!-- Text", 14, "does not end"),
        ("\n\nVectors", "\r\n\r\nVectors", 1, r"lines end in \\n"),
        (
            "<!-- format: saved_model_2 -->",
            "<!-- format: saved_model_2 -->\n<!-- format: hub -->",
            8,
            "the tag format is repeated",
        ),
        (
            "<!-- format:",
            "<!-- license: mine -->\n<!-- format:",
            7,
            "license has no value 'mine'",
        ),
        (
            "<!-- format:",
            "<!-- dataset: mine -->\n<!-- format:",
            7,
            "dataset has no value 'mine'",
        ),
        (
            "<!-- format:",
            "<!-- language: british -->\n<!-- format:",
            7,
            "language has no value 'british'",
        ),
        (
            "<!-- format:",
            "<!-- colab: https://example.org/ -->\n<!-- format:",
            7,
            "colab begins with",
        ),
        (
            "<!-- format:",
            "<!-- interactive-visualizer: x -->\n<!-- format:",
            7,
            "interactive-visualizer has no value 'x'",
        ),
    ],
)
def test_every_rule_of_models(old, new, line, message):
    assert old in FEATURES
    with pytest.raises(errors.HandleError) as caught:
        documentation_check.check(FEATURES.replace(old, new, 1), FEATURES_PATH)
    found = [
        text
        for text in str(caught.value).split("\n  ")[1:]
        if text.startswith(f"line {line}: ")
    ]
    assert any(re.search(message, text) for text in found), str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bit/1\n", "bit/2\n", "line 1: a collection has the version 1"),
        ("bit/1\n", "other/1\n", "line 1: a file with this first line is"),
        ("<!-- task: image-feature-vector -->\n", "", None),
        ("https://tfhub.dev/", "", "links to a model"),
        ("<!-- language:", "<!-- license:", "no tag 'license'"),
        (
            "<!-- task: image-feature-vector -->\n"
            "<!-- task: image-classification -->\n",
            "",
            "must have the tag task",
        ),
    ],
)
def test_every_rule_of_collections(old, new, message):
    assert old in COLLECTION
    text = COLLECTION.replace(old, new, 1)
    if message is None:
        documentation_check.check(text, COLLECTION_PATH)
    else:
        with pytest.raises(errors.HandleError, match=message):
            documentation_check.check(text, COLLECTION_PATH)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("google", "other", "a file with this first line is other/other.md"),
        ("[![Icon", "<!-- task: image-others -->\n[![Icon", "no tag 'task'"),
        ("[![Icon", "[![Logo", "of the form"),
        ("Somebody", "", "a short description"),
    ],
)
def test_every_rule_of_publishers(old, new, message):
    with pytest.raises(errors.HandleError, match=message):
        documentation_check.check(
            PUBLISHER.replace(old, new, 1), "google/google.md"
        )


def test_all_problems_at_once():
    text = FEATURES.replace("legacy", "x").replace("true", "x")
    with pytest.raises(errors.HandleError) as caught:
        documentation_check.check(text, "x.md")
    message = str(caught.value)
    lines = [int(line) for line in re.findall(r"\n  line (\d+): ", message)]
    assert lines == [1, 5, 6]
    assert "x.md" in message


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n", "# Module \x1b[31m", "#"])
def test_what_is_no_documentation(text):
    with pytest.raises(errors.HandleError) as caught:
        documentation_check.check(text, "x")
    assert "\x1b" not in str(caught.value)
