"""Options of every command that makes a SavedModel, and what they mean."""

import pathlib

from bit_tf import errors, variants

__all__ = ["add", "class_labels", "numerics"]


def add(parser) -> None:
    """Adds --labels, --probabilities, --l2 and --numerics to a parser."""
    parser.add_argument(
        "--labels",
        default="auto",
        help="auto: ImageNet's names for 1000 or 21843 classes; none; "
        "ilsvrc2012; imagenet21k; or a file with a name, or id<TAB>name, a "
        "line (default: %(default)s)",
    )
    parser.add_argument(
        "--probabilities",
        choices=["softmax", "sigmoid"],
        help="of a SavedModel (default: sigmoid for 21843 classes, else "
        "softmax)",
    )
    parser.add_argument(
        "--l2",
        type=float,
        default=0.0,
        help="factor of the kernels' squares in a SavedModel's "
        "regularization_losses (default: none)",
    )
    parser.add_argument(
        "--numerics",
        choices=["source", *variants.NUMERICS],
        default="source",
        help="constants of a source instead of the checkpoint's own "
        "(default: %(default)s)",
    )


def class_labels(text: str):
    """What --labels means: classes, the name of their set, "auto", or None.

    Raises:
      ExportError: it names a file that cannot be read, or that is not UTF-8
        text.
    """
    from bit_tf import labels

    if text == "none":
        return None
    if text == "auto" or text in labels.LABEL_SETS:
        return text
    try:
        lines = pathlib.Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise errors.ExportError(
            f"--labels names a file of UTF-8 text. Received: {text!r}: {error}"
        ) from error
    except (OSError, ValueError) as error:
        sets = ", ".join(labels.LABEL_SETS)
        raise errors.ExportError(
            f"--labels is auto, none, {sets}, or a file that can be read. "
            f"Received: {errors.brief(text)}: {error}."
        ) from error
    return labels.parse(lines)


def numerics(text: str) -> str | None:
    """What --numerics means: a source, or None for the checkpoint's own."""
    return None if text == "source" else text
