import math
import re

import helpers
import pytest
import sample_site
from sample_site import replaced

from bit_tf import handles
from hub_export.contradictions import contradictions
from hub_export.entry import Entry


@pytest.mark.parametrize("entry", sample_site.kinds())
def test_true_descriptions(entry):
    assert contradictions(entry) == []
    assert contradictions(Entry.parse(entry.to_json())) == []


# Part, field, another value; of a model with ten classes and names.
WRONG = [
    ("card", "architecture", "R50x1"),
    ("card", "architecture", "R51"),
    ("card", "feature_dim", 1023),
    ("card", "num_classes", 9),
    ("card", "num_classes", 0),
    ("card", "num_classes", -1),
    ("card", "num_classes", 10.5),
    ("card", "params", 1),
    ("card", "params", "many"),
    ("card", "task", "image-feature-vector"),
    ("card", "input", "RGB pictures [n, height, width, 3], float32 in [0, 1]"),
    ("card", "input", "RGB [n, 64, 64, 3] float32 or uint8"),
    ("card", "input", "float32 or uint8"),
    ("card", "input", None),
    ("card", "output", "logits float32 [n, 9]"),
    ("card", "output", "features float32 [n, 10]"),
    ("card", "output", "logits"),
    ("card", "probabilities", None),
    ("card", "probabilities", "relu"),
    ("card", "labels", None),
    ("card", "labels", "ilsvrc2012"),
    ("card", "output_stride", None),
    ("card", "numerics", None),
    ("card", "preset", {"name": "x"}),
    ("card", "preset", 7),
    ("card", "citations", (7,)),
    ("graph", "dtypes", ("float32",)),
    ("graph", "dtypes", ()),
    ("graph", "dtypes", (7,)),
    ("graph", "input_shape", (None, None, None, 1)),
    ("graph", "input_shape", (None, 64, 64, 3)),
    ("graph", "input_shape", (None, None, None, "3")),
    ("graph", "outputs", 1024),
    ("graph", "params", 1),
    ("graph", "variables", 1),
    ("graph", "variables", True),
    ("graph", "trainable_variables", 1000),
    ("graph", "regularization_losses", None),
    ("graph", "signatures", {"serving_default": {"output_1": (None, 9)}}),
    ("graph", "signatures", {"image_feature_vector": {"features": (None, 9)}}),
    ("graph", "signatures", {"image_classification": {"logits": (None, 9)}}),
    (
        "graph",
        "signatures",
        {"image_classification": {"probabilities": (None, 9)}},
    ),
    ("graph", "endpoints", {"pre_logits": (None, 9)}),
    ("graph", "endpoints", {"logits": (None, 9)}),
    ("graph", "endpoints", {"logits": (None, "9")}),
    ("graph", "labels", None),
    ("graph", "labels", 9),
    ("graph", "relative_error", 1.0),
    ("graph", "relative_error", math.nan),
    ("graph", "relative_error", None),
    ("graph", "relative_error", "0"),
    ("graph", "tolerance", None),
    ("publication", "description", None),
    ("publication", "license", 7),
    ("publication", "datasets", (7,)),
    ("provenance", "source", 7),
    ("provenance", "notes", (7,)),
    ("provenance", "versions", None),
]


@pytest.mark.parametrize(("part", "field", "value"), WRONG)
def test_contradictions(part, field, value):
    entry = helpers.make_entry("me/ten_classification/1", 10, "testing", "x")
    assert contradictions(entry) == []
    assert getattr(getattr(entry, part), field) != value
    found = contradictions(replaced(entry, part, **{field: value}))
    assert found
    assert all(re.fullmatch(r"[^\n]+\.|preset [^\n]+", text) for text in found)


def test_an_error_without_bounds_is_none():
    entry = helpers.make_entry("me/net/1", 0, "testing")
    wrong = replaced(
        entry, "graph", relative_error=math.inf, tolerance=math.inf
    )
    assert contradictions(wrong)


def test_contradictions_of_features():
    entry = helpers.make_entry("me/net/1", 0, "testing")
    assert contradictions(entry) == []
    for part, field, value in (
        ("card", "probabilities", "softmax"),
        ("card", "num_classes", 10),
        ("graph", "labels", 10),
        (
            "publication",
            "handle",
            handles.Handle.parse("me/x_classification/1"),
        ),
    ):
        wrong = replaced(entry, part, **{field: value})
        assert contradictions(wrong), field
