"""What a version is, in words: facts and examples for readers.

Pages show them as HTML, and tfhub.dev's documentation as Markdown.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bit_tf import errors, handles, presets
from hub_export.card import Card, Parent
from hub_export.entry import Entry

__all__ = [
    "HOST",
    "Example",
    "Output",
    "address",
    "clean",
    "examples",
    "file_size",
    "input_facts",
    "model_facts",
    "newest",
    "outputs",
    "parity_facts",
    "provenance_facts",
    "recommended_preset",
    "size_facts",
    "summary",
]

# Stands for the address of a repository whose publisher named none.
HOST = "https://HOST"


class Output(NamedTuple):
    """Something that a model returns.

    Attributes:
      call: how to get it, such as "model(images)".
      name: of the output there, or "".
      shape: such as "[n, 2048]".
    """

    call: str
    name: str
    shape: str


class Example(NamedTuple):
    """Code to copy.

    Attributes:
      name: short and unique, of letters, digits and "-".
      title: what it is for.
      language: "python" or "sh".
      code: lines without a final line break.
    """

    name: str
    title: str
    language: str
    code: str


def clean(text: str) -> str:
    """Text without control characters, which pages and terminals obey.

    Line breaks and tabs stay. Lone surrogates, which UTF-8 has not, and marks
    that turn the direction of writing become U+FFFD too.
    """
    return _CONTROLS.sub("\ufffd", text)


_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"
)


def file_size(size: int) -> str:
    """Bytes in words, such as "84.6 MB"."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


def newest(entries: Iterable[Entry]) -> list[Entry]:
    """The newest version of every model, in the order of their handles."""
    found = {
        entry.handle.at(None): entry
        for entry in sorted(entries, key=lambda entry: entry.handle)
    }
    return [found[handle] for handle in sorted(found, key=str)]


def address(path: object, url: str | None = None) -> str:
    """The address of something in a repository.

    Args:
      path: below the repository's root, such as a handle.
      url: the repository's public address; without it HOST stands for it.

    Raises:
      HandleError: `url` is no plain web address.
    """
    if url is not None and not (isinstance(url, str) and _URL.fullmatch(url)):
        raise errors.HandleError(
            "A repository's address is http:// or https://, a host, and "
            "perhaps a path, of the characters that addresses have, without "
            f"a query. Received: {errors.brief(url)}. Pass it as browsers "
            "show it, or leave it out."
        )
    return f"{(url or HOST).rstrip('/')}/{path}"


_URL = re.compile(
    r"https?://[\w.:\[\]-]+(?:/[\w.,:;@%!$&()*+=~/-]*)?", re.ASCII
)


def summary(entry: Entry) -> str:
    """The publisher's description in one line, or what the card gives."""
    words = " ".join(clean(entry.publication.description).split())
    if words:
        return words
    card = entry.card
    if card.num_classes:
        return f"Classification of images with {card.num_classes} classes."
    return f"Feature vectors of images, {card.feature_dim} long."


def input_facts(entry: Entry) -> list[tuple[str, str]]:
    """What the model takes: (name, value) of each fact."""
    card, graph = entry.card, entry.graph
    ranges = dict(re.findall(r"(\w+) in (\[[^\]]*\])", card.input))
    types = [
        f"{dtype} in {ranges[dtype]}" if dtype in ranges else dtype
        for dtype in graph.dtypes
    ]
    sizes = graph.input_shape[1:3]
    side = " × ".join("any" if size is None else str(size) for size in sizes)
    facts = [
        ("Shape", _spelled(graph.input_shape, ("n", "height", "width"))),
        ("Numbers", " or ".join(types)),
    ]
    if len(graph.input_shape) == 4:
        size = "any" if set(sizes) == {None} else f"{side} pixels"
        facts.append(("Height and width", size))
    if "RGB" in card.input:
        facts.append(("Colours", "red, green, blue: the last dimension"))
    return [
        *facts,
        ("As published", card.input),
        ("Recommended preparation", _preparation(recommended_preset(card))),
    ]


def _preparation(preset: presets.Preset | None) -> str:
    if preset is None:
        return "not known; any size is taken"
    if preset.resize == "none":
        return f"any size, not resized (preset {preset.name!r})"
    pixels = f"{preset.size} × {preset.size} pixels"
    words = {
        "squash": f"resized to {pixels}",
        "shortest_edge": f"shortest edge resized to {preset.size} pixels",
    }[preset.resize]
    words += f", {preset.method}"
    words += " with antialiasing" if preset.antialias else ", not antialiased"
    if preset.crop is not None:
        words += f", then the central {preset.crop} × {preset.crop}"
    return f"{words} (preset {preset.name!r})"


def recommended_preset(card: Card) -> presets.Preset | None:
    """The card's preset; raises TypeError or ValueError if it is none."""
    if card.preset is None:
        return None
    preset = presets.Preset(**card.preset)
    preset.check()
    return preset


def outputs(entry: Entry) -> list[Output]:
    """What the model returns, by every way to call it."""
    graph = entry.graph
    name = "logits" if entry.card.num_classes else "features"
    found = [Output("model(images)", name, _spelled((None, graph.outputs)))]
    for signature, shapes in sorted(graph.signatures.items()):
        call = f"model.signatures[{json.dumps(signature)}](images)"
        found += [
            Output(call, output, _spelled(shape))
            for output, shape in sorted(shapes.items())
        ]
    found += [
        Output("model.endpoints(images)", endpoint, _spelled(shape))
        for endpoint, shape in graph.endpoints.items()
    ]
    return found


def model_facts(entry: Entry) -> list[tuple[str, str]]:
    """What the model is: (name, value) of each fact."""
    card, graph = entry.card, entry.graph
    facts = [
        ("Architecture", card.architecture),
        ("Parameters", f"{card.params:,}"),
        (
            "Feature vector",
            f"{card.feature_dim} numbers" if card.feature_dim else "none",
        ),
    ]
    if card.num_classes:
        facts += [
            ("Classes", f"{card.num_classes}"),
            ("Logits become probabilities by", f"{card.probabilities}"),
            ("Class names", card.labels or "none"),
        ]
    else:
        facts += [("Classes", "none: this model has no head")]
    if card.output_stride is not None:
        facts.append(("Output stride", f"{card.output_stride}"))
    if card.numerics:
        facts.append(("Numerics", _numerics(card)))
    facts += [
        ("Variables", f"{graph.variables}"),
        ("Trainable variables", f"{graph.trainable_variables}"),
        ("Regularization losses", f"{graph.regularization_losses}"),
        ("Trained on", ", ".join(entry.publication.datasets) or "not stated"),
    ]
    return facts


def _numerics(card: Card) -> str:
    constants = dict(card.numerics)
    name = constants.pop("name", "not named")
    values = ", ".join(f"{key} {constants[key]}" for key in sorted(constants))
    return f"{name}: {values}" if values else str(name)


def size_facts(entry: Entry) -> list[tuple[str, str]]:
    """How large it is, and the archive's hash: (name, value) of each fact."""
    archive, unpacked = entry.archive.size, entry.unpacked_size
    return [
        ("Archive", f"{file_size(archive)} ({archive:,} bytes)"),
        ("Unpacked", f"{file_size(unpacked)} ({unpacked:,} bytes)"),
        ("SHA-256 of the archive", entry.archive.sha256),
        ("Published", entry.published),
    ]


def provenance_facts(entry: Entry) -> list[tuple[str, str]]:
    """Where the weights came from: (name, value) of each fact."""
    found = entry.provenance
    chosen = found.numerics_chosen
    constants = found.numerics
    if constants and chosen not in (None, "source", constants):
        constants += f"; this model computes with those of {chosen}"
    versions = sorted(found.versions.items())
    facts = [
        ("Source", found.source or "not a file: a model made in Python"),
        ("Published as", found.name),
        ("SHA-256 of the source", found.sha256),
        ("Format", found.format),
        ("Constants of the source", constants),
        ("Made around", "; ".join(map(_parent, found.parents))),
        ("Arrays left out", ", ".join(found.extra_arrays)),
        ("Notes", " ".join(found.notes)),
        ("Written by", ", ".join(f"{name} {text}" for name, text in versions)),
    ]
    return [(name, value) for name, value in facts if value]


def _parent(parent: Parent) -> str:
    if parent.sha256 is None:
        return parent.handle
    return f"{parent.handle} (SHA-256 of its content {parent.sha256})"


def parity_facts(entry: Entry) -> list[tuple[str, str]]:
    """What was measured when it was published: (name, value) of each fact."""
    graph = entry.graph
    if graph.relative_error is None:
        values = "none inside this SavedModel"
    else:
        values = (
            f"relative error {graph.relative_error:.2g}, "
            f"allowed {graph.tolerance:g}"
        )
    return [
        ("Golden values, in a fresh process", values),
        (
            "Trainable variables found there",
            f"{graph.trainable_variables} of {graph.variables}",
        ),
    ]


def _spelled(
    shape: Iterable[int | None], names: Sequence[str] = ("n", "h", "w")
) -> str:
    """A shape in words: (None, 7, None, 64) → "[n, 7, w, 64]"."""
    sizes = [
        str(size) if size is not None else "".join(names[index : index + 1])
        for index, size in enumerate(shape)
    ]
    return f"[{', '.join(size or '?' for size in sizes)}]"


def examples(entry: Entry, url: str | None = None) -> list[Example]:
    """Code that calls the model, to be copied.

    Args:
      entry: of the version.
      url: the repository's public address; without it HOST stands for it.
    """
    handle = address(entry.handle, url)
    called = f"handle = {json.dumps(handle)}\n"
    archive = f"{handle}{handles.ARCHIVE_SUFFIX}"
    card, graph = entry.card, entry.graph
    output = "logits" if card.num_classes else "features"
    trained = ", trainable=True" if graph.trainable_variables else ""
    input_shape = ", ".join(map(str, graph.input_shape[1:]))
    head = "" if card.num_classes else "        {}.layers.Dense(10),\n"
    found = [
        Example(
            "hub-load",
            "hub.load",
            "python",
            "import tensorflow as tf\n"
            "import tensorflow_hub as hub\n\n"
            f"{called}"
            "model = hub.load(handle)\n"
            f"{_picture(entry)}"
            f"{output} = model(images)  # [1, {graph.outputs}]"
            + (
                f"\nprobabilities = tf.nn.{card.probabilities}(logits)"
                if card.probabilities
                else ""
            ),
        ),
        Example(
            "keras-2",
            "hub.KerasLayer, in Keras 2",
            "python",
            "import tensorflow_hub as hub\n"
            "import tf_keras  # Keras 2: pip install tf_keras\n\n"
            f"{called}"
            "model = tf_keras.Sequential(\n    [\n"
            f"        tf_keras.Input([{input_shape}]),\n"
            f"        hub.KerasLayer(handle{trained}),\n"
            f"{head.format('tf_keras')}    ]\n)",
        ),
        Example(
            "keras-3",
            "bit_tf.hub.KerasLayer, in Keras 3",
            "python",
            "import keras\n"
            "from bit_tf import hub  # pip install bit-tf\n\n"
            f"{called}"
            "model = keras.Sequential(\n    [\n"
            f"        keras.Input([{input_shape}]),\n"
            f"        hub.KerasLayer(handle{trained}),\n"
            f"{head.format('keras')}    ]\n)",
        ),
    ]
    if not card.num_classes or "image_feature_vector" in graph.signatures:
        found += [
            Example(
                "encoder",
                "BitMedium2Vec",
                "python",
                "from bit_tf import BitMedium2Vec\n\n"
                f"{called}"
                "encoder = BitMedium2Vec(model_url=handle)\n"
                'vector = encoder.encode("photo.jpg")  '
                f"# {card.feature_dim} numbers",
            ),
            Example(
                "embed",
                "bit-tf embed: vectors in a terminal",
                "sh",
                f"bit-tf embed photo.jpg --model {shlex.quote(handle)}"
                f"{_preset_option(card)}",
            ),
        ]
    if card.num_classes:
        found.append(
            Example(
                "classify",
                "bit-tf classify: names and scores in a terminal",
                "sh",
                f"bit-tf classify photo.jpg --model {shlex.quote(handle)}"
                f"{_preset_option(card)}",
            )
        )
    name = f"{entry.handle.name.rpartition('/')[2]}-{entry.handle.version}"
    file = f"{name}{handles.ARCHIVE_SUFFIX}"
    found.append(
        Example(
            "curl",
            "curl and tar",
            "sh",
            f"curl --fail --location --output {file} {shlex.quote(archive)}\n"
            f"echo '{entry.archive.sha256}  {file}' | sha256sum --check\n"
            f"mkdir {name} && tar -xzf {file} -C {name}",
        )
    )
    return found


def _preset_option(card: Card) -> str:
    preset = recommended_preset(card)
    if preset is None or preset.name not in presets.PRESETS:
        return ""
    return f" --preset {shlex.quote(preset.name)}"


def _picture(entry: Entry) -> str:
    """Code that makes `images` of a file, or of zeros where it is unusual."""
    graph, preset = entry.graph, recommended_preset(entry.card)
    shape = graph.input_shape
    floats = "float32" in graph.dtypes
    if len(shape) != 4 or not (floats or "uint8" in graph.dtypes):
        sizes = [1, *(size or 224 for size in shape[1:])]
        dtype = graph.dtypes[0] if graph.dtypes else "float32"
        return f"images = tf.zeros({sizes}, tf.{dtype})\n"
    side: Sequence[int | None] = shape[1:3]
    squashed = preset is not None and preset.resize == "squash"
    if preset and squashed and preset.crop is None and not preset.antialias:
        side = [size or preset.size for size in side]
    lines = [
        "image = tf.io.decode_image(",
        '    tf.io.read_file("photo.jpg"), channels=3, expand_animations=False',
        ")",
    ]
    if floats:
        lines += [
            "image = tf.image.convert_image_dtype(image, tf.float32)  # [0, 1]"
        ]
    if None not in side:
        lines += [f"image = tf.image.resize(image, {list(side)})"]
        if not floats:
            lines += ["image = tf.cast(tf.round(image), tf.uint8)"]
    return "\n".join([*lines, "images = image[tf.newaxis]", ""])
