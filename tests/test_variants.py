import math

import pytest

import bit_tf
from bit_tf import errors, presets, variants
from bit_tf.checkpoints import google_npz, layout

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
    assert len(variants.list_models("timm/*")) == 6 * 2 + 3
    assert len(rows) == 6 + 12 + 8 + 285 + 48 + 15 + 1


def test_rows_agree_with_themselves():
    for row in bit_tf.list_models():
        assert row.architecture in COUNTS
        assert row.numerics in variants.NUMERICS
        assert row.url is None or row.url.endswith(f"/{row.name}.npz")
        assert row.url or row.handle or row.repository
        assert row.repository in (None, row.name)
        assert row.repository is None or row.numerics == "timm"
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


def test_sizes_are_those_of_the_layout():
    sized = [row for row in bit_tf.list_models() if row.size is not None]
    assert sized == variants.list_models("BiT-M-*-ILSVRC2012")
    for row in sized:
        architecture = variants.architecture(row.architecture)
        shapes = layout.expected_shapes(
            architecture.blocks, architecture.stem_width, row.num_classes
        )
        assert row.size == google_npz.file_size(shapes)


# Repository: classes, pixels, filter, as in timm's default_cfgs.
REPOSITORIES = {
    "timm/resnetv2_50x1_bit.goog_in21k": (21843, 224, "bilinear"),
    "timm/resnetv2_50x3_bit.goog_in21k_ft_in1k": (1000, 448, "bilinear"),
    "timm/resnetv2_101x3_bit.goog_in21k_ft_in1k": (1000, 448, "bilinear"),
    "timm/resnetv2_152x4_bit.goog_in21k_ft_in1k": (1000, 480, "bilinear"),
    "timm/resnetv2_50x1_bit.goog_distilled_in1k": (1000, 224, "bicubic"),
    "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k": (
        1000,
        224,
        "bicubic",
    ),
    "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384": (
        1000,
        384,
        "bicubic",
    ),
    "google/bit-50": (1000, 448, "bilinear"),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories(name):
    row = variants.variant(name)
    assert row.name == row.repository == name
    assert (row.url, row.handle, row.feature_handle) == (None, None, None)
    classes, pixels, method = REPOSITORIES[name]
    assert (row.num_classes, row.resolution) == (classes, pixels)
    preset = presets.preset(row.preset)
    assert (preset.crop, preset.method) == (pixels, method)
    assert preset.antialias
    taught = "distilled" in name or "teacher" in name
    assert row.citation.endswith("2106.05237" if taught else "1912.11370")
    if name.startswith("timm/"):
        depth = name.split("resnetv2_")[1].split("_bit")[0]
        assert row.architecture == f"R{depth}"


def test_names_of_files():
    row = variants.variant("BiT-S-R50x1")
    for name in ("BiT-S-R50x1.npz", "BiT-S-R50x1.h5"):
        assert variants.variant(name) is row
    assert variants.variant("BiT-M-R152x4-ILSVRC2012.h5").num_classes == 1000
    assert variants.variant("distill/R50x1_224.npz").resolution == 224
    for name in (
        "distill/R50x1_224.h5",
        "google/bit-50.npz",
        "experts/bit/r50x1/in21k/bird.npz",
        "BiT-S-R50x1.npz.npz",
        "BiT-S-R50x1npz",
        "BiT-S-R50x1.",
    ):
        with pytest.raises(errors.UnknownNameError):
            variants.variant(name)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(errors.UnknownNameError, match="'BiT-M-R50x1'"):
        variants.variant("bit-m-r50x1")
    with pytest.raises(errors.UnknownNameError, match="R152x2"):
        variants.architecture("r152x2")


def test_find_architecture():
    assert variants.find_architecture((3, 4, 6, 3), 64).name == "R50x1"
    assert variants.find_architecture((3, 4, 6, 3), 32) is None
