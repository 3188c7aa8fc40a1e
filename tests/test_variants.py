import math

import pytest

import bit_tf
from bit_tf import errors, variants
from bit_tf.checkpoints import layout

# Name: feature dim, backbone, with 1000, with 21843, arrays with a head.
COUNTS = {
    "R50x1": (2048, 23_500_352, 25_549_352, 68_256_659, 153),
    "R50x3": (6144, 211_174_080, 217_319_080, 345_399_315, 153),
    "R101x1": (2048, 42_492_480, 44_541_480, 87_248_787, 306),
    "R101x3": (6144, 381_789_888, 387_934_888, 516_015_123, 306),
    "R152x2": (4096, 232_238_208, 236_335_208, 321_728_979, 459),
    "R152x4": (8192, 928_340_224, 936_533_224, 1_107_299_923, 459),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    row = variants.architecture(name)
    features, backbone, with_1k, with_21k, arrays = COUNTS[name]
    assert row.feature_dim == features
    assert row.count_params() == backbone
    assert row.count_params(1000) == with_1k
    assert row.count_params(21843) == with_21k
    assert row.count_arrays(head=True) == arrays


@pytest.mark.parametrize("name", variants.ARCHITECTURES)
@pytest.mark.parametrize("classes", [0, 10])
def test_counts_follow_from_the_layout(name, classes):
    row = variants.architecture(name)
    shapes = layout.expected_shapes(row.blocks, row.stem_width, classes)
    assert row.count_params(classes) == sum(map(math.prod, shapes.values()))
    assert row.count_arrays(bool(classes)) == len(shapes)


def test_table_of_published_weights():
    rows = bit_tf.list_models()
    assert len({row.name for row in rows}) == len(rows)
    assert len(variants.list_models("BiT-S-*")) == 6
    assert len(variants.list_models("BiT-M-*-ILSVRC2012")) == 6
    assert len(variants.list_models("BiT-M-*")) == 12
    assert len(variants.list_models("distill/*")) == 8
    assert len(variants.list_models("vtab/*")) == 5 * 19 * 3
    assert len(variants.list_models("experts/*")) == 48
    assert len(rows) == 6 + 12 + 8 + 285 + 48


def test_rows_agree_with_themselves():
    for row in bit_tf.list_models():
        assert row.architecture in COUNTS
        assert row.numerics in variants.NUMERICS
        assert row.url is None or row.url.endswith(f"/{row.name}.npz")
        assert row.url or row.handle
        if row.labels:
            from bit_tf import labels

            assert labels.LABEL_SETS[row.labels] == row.num_classes
        if row.preset:
            from bit_tf import images

            assert images.preset(row.preset).crop in (None, row.resolution) or (
                row.preset == "big_transfer eval"
            )


def test_known_handles():
    row = variants.variant("BiT-M-R50x1")
    assert row.feature_handle == "https://tfhub.dev/google/bit/m-r50x1/1"
    assert row.handle == (
        "https://tfhub.dev/google/bit/m-r50x1/imagenet21k_classification/1"
    )
    assert row.activation == "sigmoid"
    row = variants.variant("BiT-M-R50x1-ILSVRC2012.npz")
    assert row.handle == (
        "https://tfhub.dev/google/bit/m-r50x1/ilsvrc2012_classification/1"
    )
    assert row.activation == "softmax"
    assert variants.variant("BiT-S-R152x2").handle is None
    assert variants.variant("experts/bit/r50x1/in21k/bird").url is None


def test_unknown_names_suggest_near_ones():
    with pytest.raises(errors.UnknownNameError, match="'BiT-M-R50x1'"):
        variants.variant("bit-m-r50x1")
    with pytest.raises(errors.UnknownNameError, match="R152x2"):
        variants.architecture("r152x2")


def test_find_architecture():
    assert variants.find_architecture((3, 4, 6, 3), 64).name == "R50x1"
    assert variants.find_architecture((3, 4, 6, 3), 32) is None
