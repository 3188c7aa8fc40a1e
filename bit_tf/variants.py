"""What exists: architectures, sources' constants, and published weights.

The one table of facts. Counts and sizes beside the numbers are held against
the layout by tests/test_variants.py. Sources: google-research/big_transfer
(README.md and bit_*/models.py), the tfhub.dev documentation repository, timm
(models/resnetv2.py), huggingface.co/google/bit-50.
"""

import dataclasses
import fnmatch
import functools

from bit_tf import errors, labels

__all__ = [
    "ARCHITECTURES",
    "BUCKET",
    "EXPERTS",
    "NUMERICS",
    "VTAB_TASKS",
    "Architecture",
    "Numerics",
    "Variant",
    "architecture",
    "find_architecture",
    "list_models",
    "numerics",
    "variant",
]

BIT = "https://arxiv.org/abs/1912.11370"
FUNMATCH = "https://arxiv.org/abs/2106.05237"
EXPERT_MODELS = "https://arxiv.org/abs/2009.13239"
BUCKET = "https://storage.googleapis.com/bit_models/"
_HUB = "https://tfhub.dev/google/"


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The constants that a source's weights were trained or ported with.

    Attributes:
      name: the source.
      ws_epsilon: added to a kernel's variance, inside the root.
      gn_epsilon: added to a group's variance, inside the root.
      pool_border: the value around the picture in the root's max pooling.
    """

    name: str
    ws_epsilon: float
    gn_epsilon: float
    pool_border: float


NUMERICS = {
    row.name: row
    for row in (
        Numerics("google", 1e-10, 1e-5, 0.0),
        Numerics("big_vision", 1e-10, 1e-5, float("-inf")),
        Numerics("timm", 1e-8, 1e-5, 0.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A ResNet-v2 with group normalization and standardized convolutions.

    Attributes:
      name: such as "R50x1": depth, then width.
      blocks: the number of bottleneck units in block1 to block4.
      stem_width: channels of the root convolution, 64 × the width factor.
      params: number of weights without a head.
    """

    name: str
    blocks: tuple[int, int, int, int]
    stem_width: int
    params: int

    @property
    def feature_dim(self) -> int:
        """Length of the feature vector, 2048 × the width factor."""
        return 32 * self.stem_width

    def count_params(self, num_classes: int = 0) -> int:
        """Number of weights with a head of `num_classes`."""
        return self.params + num_classes * (
            self.feature_dim + bool(num_classes)
        )

    def count_arrays(self, head: bool = False) -> int:
        """Number of arrays of a checkpoint, with or without the head's two."""
        return 9 * sum(self.blocks) + 4 + 3 + 2 * head


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("R50x1", (3, 4, 6, 3), 64, 23_500_352),
        Architecture("R50x3", (3, 4, 6, 3), 192, 211_174_080),
        Architecture("R101x1", (3, 4, 23, 3), 64, 42_492_480),
        Architecture("R101x3", (3, 4, 23, 3), 192, 381_789_888),
        Architecture("R152x2", (3, 8, 36, 3), 128, 232_238_208),
        Architecture("R152x4", (3, 8, 36, 3), 256, 928_340_224),
        # For tests and the demo: every kind of layer, and quick to run.
        Architecture("testing", (1, 1, 1, 1), 32, 2_007_328),
    )
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One set of published weights.

    Attributes:
      name: the file's name without ".npz" and the bucket, for an expert the
        handle's path, or the Hugging Face repository.
      architecture: a name in ARCHITECTURES.
      num_classes: outputs of the head; 0 where none was published.
      labels: a label set of bit_tf.labels, or None.
      activation: what turns logits into probabilities.
      resolution: side in pixels of the square pictures the weights last saw.
      preset: how the source prepares a picture, a name of images.PRESETS.
      numerics: a name in NUMERICS.
      url: the .npz, or None for weights published elsewhere only.
      size: bytes of that .npz, or None where it is not known.
      repository: the Hugging Face repository "owner/name", or None.
      handle: the TF-Hub handle with these outputs (logits, or features where
        there is no head), or None.
      feature_handle: the TF-Hub handle of the features, or None.
      citation: the paper.
    """

    name: str
    architecture: str
    num_classes: int
    labels: str | None
    activation: str
    resolution: int
    preset: str | None
    numerics: str
    url: str | None
    size: int | None
    repository: str | None
    handle: str | None
    feature_handle: str | None
    citation: str

    @property
    def params(self) -> int:
        """Number of weights, the head included."""
        return ARCHITECTURES[self.architecture].count_params(self.num_classes)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of the files in the bucket: ".npz", perhaps also ".h5"."""
        if self.url is None:
            return ()
        return (".npz", ".h5") if self.name.startswith("BiT-") else (".npz",)


# Suffix of the file: (classes, side of the test pictures in pixels).
VTAB_TASKS = {
    "caltech101": (102, 480),
    "cifar100": (100, 128),
    "dtd": (47, 480),
    "oxford_flowers102": (102, 480),
    "oxford_iiit_pet": (37, 480),
    "sun397": (397, 480),
    "svhn": (10, 128),
    "patch_camelyon": (2, 480),
    "eurosat": (10, 128),
    "resisc45": (45, 480),
    "diabetic_retinopathy": (5, 480),
    "clevr-count": (8, 480),
    "clevr-distance": (6, 480),
    "dmlab": (6, 480),
    "kitti-distance": (4, 480),
    "dsprites-orientation": (16, 128),
    "dsprites-xpos": (16, 128),
    "smallnorb-azimuth": (18, 480),
    "smallnorb-elevation": (9, 480),
}

EXPERTS = (
    "abstraction angiosperm animal arthropod artifact bird carnivore chordate "
    "clothing commodity consumer_goods container conveyance covering device "
    "entity equipment flower food foodstuff herb implement instrument "
    "instrumentality invertebrate living_thing mammal matter natural_object "
    "nutrient nutriment object organism part physical_entity placental plant "
    "relation solid spermatophyte structure substance tree vascular_plant "
    "vehicle vertebrate whole woody_plant"
).split()

_ON_HUB = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x4")
# Bytes of BiT-M-*-ILSVRC2012.npz.
_ILSVRC2012_SIZES = {
    "R50x1": 102_242_668,
    "R50x3": 869_321_580,
    "R101x1": 178_256_468,
    "R101x3": 1_551_830_100,
    "R152x2": 945_476_668,
    "R152x4": 3_746_270_104,
}
_PUBLISHED = tuple(name for name in ARCHITECTURES if name != "testing")


def _row(name: str, architecture: str, num_classes: int, **facts) -> Variant:
    defaults: dict = {
        "labels": labels.of_count(num_classes),
        "activation": labels.activation(num_classes),
        "resolution": 224,
        "preset": "big_transfer eval",
        "numerics": "google",
        "url": f"{BUCKET}{name}.npz",
        "size": None,
        "repository": None,
        "handle": None,
        "feature_handle": None,
        "citation": BIT,
    }
    return Variant(name, architecture, num_classes, **(defaults | facts))


def _rows():
    for family, num_classes, task in (
        ("S", 1000, "ilsvrc2012"),
        ("M", 21843, "imagenet21k"),
    ):
        for arch in _PUBLISHED:
            module = f"{_HUB}bit/{family.lower()}-{arch.lower()}"
            on_hub = arch in _ON_HUB
            yield _row(
                f"BiT-{family}-{arch}",
                arch,
                num_classes,
                handle=f"{module}/{task}_classification/1" if on_hub else None,
                feature_handle=f"{module}/1" if on_hub else None,
            )
    for arch in _PUBLISHED:
        module = f"{_HUB}bit/m-{arch.lower()}/ilsvrc2012_classification/1"
        yield _row(
            f"BiT-M-{arch}-ILSVRC2012",
            arch,
            1000,
            resolution=480,
            size=_ILSVRC2012_SIZES[arch],
            handle=module if arch in _ON_HUB else None,
        )
    for name, arch, classes, size, preset in (
        ("R50x1_224", "R50x1", 1000, 224, "timm distilled"),
        ("R50x1_160", "R50x1", 1000, 160, None),
        ("R152x2_T_224", "R152x2", 1000, 224, "timm distilled"),
        ("R152x2_T_384", "R152x2", 1000, 384, "timm teacher 384"),
        ("R152x2_T_flowers128", "R152x2", 102, 128, None),
        ("R152x2_T_pet128", "R152x2", 37, 128, None),
        ("R152x2_T_food128", "R152x2", 101, 128, None),
        ("R152x2_T_sun128", "R152x2", 397, 128, None),
    ):
        yield _row(
            f"distill/{name}",
            arch,
            classes,
            resolution=size,
            preset=preset,
            citation=FUNMATCH,
        )
    for arch in _ON_HUB:
        for task, (classes, size) in VTAB_TASKS.items():
            for run in range(3):
                yield _row(
                    f"vtab/BiT-M-{arch}-run{run}-{task}",
                    arch,
                    classes,
                    resolution=size,
                    preset="big_transfer eval 128"
                    if size == 128
                    else "big_transfer eval",
                )
    for expert in EXPERTS:
        path = f"experts/bit/r50x1/in21k/{expert}"
        yield _row(
            path,
            "R50x1",
            0,
            url=None,
            handle=f"{_HUB}{path}/1",
            feature_handle=f"{_HUB}{path}/1",
            citation=EXPERT_MODELS,
        )
    for arch in _PUBLISHED:
        name = f"timm/resnetv2_{arch[1:]}_bit.goog_in21k"
        wide = arch == "R152x4"
        yield _ported(name, arch, 21843, 224, "timm in21k")
        yield _ported(
            f"{name}_ft_in1k",
            arch,
            1000,
            480 if wide else 448,
            "timm in1k 480" if wide else "timm in1k",
        )
    for name, arch, size, preset in (
        ("50x1_bit.goog_distilled_in1k", "R50x1", 224, "timm distilled"),
        (
            "152x2_bit.goog_teacher_in21k_ft_in1k",
            "R152x2",
            224,
            "timm distilled",
        ),
        (
            "152x2_bit.goog_teacher_in21k_ft_in1k_384",
            "R152x2",
            384,
            "timm teacher 384",
        ),
    ):
        yield _ported(
            f"timm/resnetv2_{name}", arch, 1000, size, preset, FUNMATCH
        )
    yield _ported("google/bit-50", "R50x1", 1000, 448, "hf bit-50")


def _ported(
    repository: str,
    architecture: str,
    num_classes: int,
    resolution: int,
    preset: str,
    citation: str = BIT,
) -> Variant:
    """Weights in a Hugging Face repository, which all run timm's constants."""
    return _row(
        repository,
        architecture,
        num_classes,
        resolution=resolution,
        preset=preset,
        numerics="timm",
        url=None,
        repository=repository,
        citation=citation,
    )


@functools.cache
def _table() -> dict[str, Variant]:
    return {row.name: row for row in _rows()}


def list_models(pattern: str = "*") -> list[Variant]:
    """Published weights whose name matches a shell pattern, in table order.

    Args:
      pattern: such as "BiT-M-*" or "vtab/*-dtd"; case does not matter.
    """
    pattern = str(pattern).lower()
    return [
        row
        for row in _table().values()
        if fnmatch.fnmatchcase(row.name.lower(), pattern)
    ]


def variant(name: str) -> Variant:
    """The published weights of that name.

    Args:
      name: with or without the suffix of a file in the bucket, ".npz" or for
        some ".h5".

    Raises:
      UnknownNameError: there are none; the message names near misses.
    """
    stem, dot, suffix = str(name).rpartition(".")
    row = _table().get(stem)
    if row is not None and dot + suffix in row.suffixes:
        return row
    return errors.lookup(_table(), name, "Published weights")


def architecture(name: str) -> Architecture:
    """The architecture of that name, such as "R50x1".

    Raises:
      UnknownNameError: there is none; the message lists all.
    """
    return errors.lookup(ARCHITECTURES, name, "Architectures")


def numerics(name: str) -> Numerics:
    """The constants of that source, such as "google".

    Raises:
      UnknownNameError: there is none; the message lists all.
    """
    return errors.lookup(NUMERICS, name, "Numerics")


def find_architecture(
    blocks: tuple[int, ...], stem_width: int
) -> Architecture | None:
    """The row with these blocks and stem width, or None."""
    for row in ARCHITECTURES.values():
        if row.blocks == tuple(blocks) and row.stem_width == stem_width:
            return row
    return None
