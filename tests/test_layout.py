"""Names, shapes, detection and comparison, against the published numbers."""

import math
import re

import pytest

from bit_tf import errors
from bit_tf.checkpoints import layout

R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
ROOT = "root_block/standardized_conv2d/kernel"
PUBLISHED = [
    (R50, 1, 153, 53, 23_500_352, 25_549_352, 68_256_659),
    (R50, 3, 153, 53, 211_174_080, 217_319_080, 345_399_315),
    (R101, 1, 306, 104, 42_492_480, 44_541_480, 87_248_787),
    (R101, 3, 306, 104, 381_789_888, 387_934_888, 516_015_123),
    (R152, 2, 459, 155, 232_238_208, 236_335_208, 321_728_979),
    (R152, 4, 459, 155, 928_340_224, 936_533_224, 1_107_299_923),
]


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_architectures(row):
    blocks, width, arrays, convs, backbone, head_1k, head_21k = row
    with_head = layout.expected_shapes(blocks, 64 * width, 1000)
    assert len(with_head) == arrays
    assert sum("standardized" in name for name in with_head) == convs
    assert count(with_head) == head_1k
    assert count(layout.expected_shapes(blocks, 64 * width, 0)) == backbone
    assert count(layout.expected_shapes(blocks, 64 * width, 21843)) == head_21k


def test_shapes_of_the_layout():
    shapes = layout.expected_shapes(R50, 64, 10)
    assert list(shapes) == sorted(shapes)
    assert shapes[ROOT] == (7, 7, 3, 64)
    assert shapes["block1/unit01/a/group_norm/gamma"] == (64,)
    assert shapes["block1/unit02/a/group_norm/gamma"] == (256,)
    proj = "block2/unit01/a/proj/standardized_conv2d/kernel"
    assert shapes[proj] == (1, 1, 256, 512)
    assert "block2/unit02/a/proj/standardized_conv2d/kernel" not in shapes
    b = "block4/unit03/b/standardized_conv2d/kernel"
    assert shapes[b] == (3, 3, 512, 512)
    assert shapes["group_norm/beta"] == (2048,)
    assert shapes["head/conv2d/kernel"] == (2048, 10)
    assert shapes["head/conv2d/bias"] == (10,)


def test_no_classes_means_no_head():
    shapes = layout.expected_shapes((1, 1, 1, 1), 32, 0)
    assert not any(name.startswith("head") for name in shapes)


@pytest.mark.parametrize(
    ("blocks", "stem_width", "num_classes"),
    [
        ((1, 1, 1), 32, 0),
        ((1, 0, 1, 1), 32, 0),
        ((1, 1, 1, 1), 0, 0),
        ((1, 1, 1, 1), 48, 0),
        ((1, 1, 1, 1), -32, 0),
        ((1, 1, 1, 1), 32, -1),
    ],
)
def test_impossible_architectures(blocks, stem_width, num_classes):
    with pytest.raises(ValueError, match="Received"):
        layout.expected_shapes(blocks, stem_width, num_classes)


@pytest.mark.parametrize("num_classes", [0, 1, 10, 21843])
@pytest.mark.parametrize(
    ("blocks", "stem_width"),
    [
        (R50, 64),
        (R152, 256),
        ((1, 1, 1, 1), 32),
        ((2, 1, 12, 1), 96),
        ((1, 99, 100, 2), 64),
    ],
)
def test_detection_inverts_the_layout(blocks, stem_width, num_classes):
    shapes = layout.expected_shapes(blocks, stem_width, num_classes)
    detected = layout.detect(shapes)
    assert detected == layout.Detected(blocks, stem_width, num_classes)


def test_detection_ignores_the_order_of_names():
    shapes = layout.expected_shapes(R50, 64, 5)
    backwards = dict(reversed(shapes.items()))
    assert layout.detect(backwards) == layout.Detected(R50, 64, 5)


@pytest.mark.parametrize("unit", ["unit00", "unit002", "unit2", "unit0002"])
def test_misspelt_units_are_not_counted(unit):
    shapes = layout.expected_shapes((1, 1, 1, 1), 32, 0)
    name = f"block1/{unit}/a/group_norm/gamma"
    detected = layout.detect(shapes | {name: (128,)})
    assert detected.blocks == (1, 1, 1, 1)


def test_a_gap_names_the_missing_unit():
    shapes = layout.expected_shapes(R50, 64, 0)
    kept = {n: s for n, s in shapes.items() if "block3/unit04/" not in n}
    with pytest.raises(errors.CheckpointMismatchError) as raised:
        layout.detect(kept)
    assert str(raised.value).endswith("1:\n− block3/unit04")


def test_an_empty_block_is_named():
    shapes = layout.expected_shapes(R50, 64, 0)
    kept = {n: s for n, s in shapes.items() if not n.startswith("block4/")}
    with pytest.raises(errors.CheckpointMismatchError, match="− block4/unit01"):
        layout.detect(kept)


@pytest.mark.parametrize("shapes", [{}, {"conv1/kernel": (7, 7, 3, 64)}])
def test_another_model_is_told_what_is_missing(shapes):
    with pytest.raises(errors.CheckpointMismatchError, match=f"− {ROOT}"):
        layout.detect(shapes)


@pytest.mark.parametrize("width", [0, 8, 48])
def test_a_width_without_32_groups(width):
    with pytest.raises(errors.CheckpointMismatchError, match="multiple of 32"):
        layout.detect({ROOT: (7, 7, 3, width)})


def test_root_kernel_of_oihw():
    with pytest.raises(errors.CheckpointMismatchError, match="OIHW"):
        layout.detect({ROOT: (64, 3, 7, 7)})


def test_check_accepts_what_is_equal():
    shapes = layout.expected_shapes((1, 1, 1, 1), 32, 3)
    assert layout.check(shapes, shapes) == ()
    assert layout.check({n: list(s) for n, s in shapes.items()}, shapes) == ()


def test_check_lists_every_difference_in_order():
    expected = {"a": (1,), "b": (1, 1, 2, 3), "c": (2, 3), "d": (4,)}
    found = {"b": (3, 2, 1, 1), "c": (3, 2), "d": (5,), "e\x1b": ()}
    with pytest.raises(errors.CheckpointMismatchError) as raised:
        layout.check(found, expected)
    header, *lines = str(raised.value).splitlines()
    assert "1 missing (−), 1 extra (+), 3 of another shape (≠)" in header
    assert "renamed" in header
    assert lines[0] == "− a (1,)"
    assert lines[1].startswith("≠ b: expected (1, 1, 2, 3), found (3, 2, 1, 1)")
    assert "OIHW" in lines[1]
    assert "transposed" in lines[2]
    assert lines[3] == "≠ d: expected (4,), found (5,)"
    assert lines[4] == "+ 'e\\x1b' ()"


def test_check_lists_hundreds():
    expected = layout.expected_shapes(R152, 64, 0)
    with pytest.raises(errors.CheckpointMismatchError) as raised:
        layout.check({}, expected)
    lines = str(raised.value).splitlines()[1:]
    assert lines == [f"− {name} {shape}" for name, shape in expected.items()]


@pytest.mark.parametrize(
    ("expected", "found", "hint"),
    [
        ((3, 3, 8, 16), (16, 8, 3, 3), "OIHW"),
        ((1, 1, 8, 16), (1, 1, 16, 8), "transposed"),
        ((8, 16), (16, 8, 1, 1), "OIHW"),
        ((8, 16), (16, 8), "transposed"),
        ((8,), (1, 1, 1, 8), "reshaped"),
        ((8,), (9,), "found (9,)"),
    ],
)
def test_hints(expected, found, hint):
    with pytest.raises(errors.CheckpointMismatchError, match=re.escape(hint)):
        layout.check({"x": found}, {"x": expected})


def test_extra_names_are_returned_when_allowed():
    expected = {"a": (1,)}
    found = {"z": (), "a": (1,), "b": (2,)}
    assert layout.check(found, expected, allow_extra=True) == ("b", "z")
    with pytest.raises(errors.CheckpointMismatchError, match="\\+ b"):
        layout.check(found, expected)
    with pytest.raises(errors.CheckpointMismatchError, match="− a"):
        layout.check({"b": (2,)}, expected, allow_extra=True)


def test_claims():
    for name in layout.expected_shapes(R50, 64, 10):
        assert layout.claims(name)
        assert layout.claims(name.upper())
    for name in (
        "block5/unit01/a/group_norm/gamma",
        "block1/unit02/a/proj/standardized_conv2d/kernel",
        "block1/unit007/d/group_norm/beta",
        "head/conv2d_1/kernel",
    ):
        assert layout.claims(name)
    for name in (
        "global_step",
        "head/conv2d/kernel/Momentum",
        "block1/unit01/a/group_norm/moving_mean",
        "block1/unit01/a/group_norm/gamma ",
        "../group_norm/gamma",
        "",
    ):
        assert not layout.claims(name)
