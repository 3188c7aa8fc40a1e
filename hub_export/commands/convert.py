"""`hub-export convert`: checkpoint → SavedModel."""

import json
import pathlib
import sys

from bit_tf import errors, variants
from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="checkpoint to SavedModel",
        description="Converts a checkpoint, in any format that is read, into a "
        "SavedModel for hub.load, hub.KerasLayer and TF Serving. The result is "
        "loaded back in a fresh process and checked before it appears.",
    )
    parser.add_argument("source", metavar="IN", help="the checkpoint")
    parser.add_argument("path", metavar="OUT", help="the directory to make")
    parser.add_argument(
        "--to",
        choices=["savedmodel"],
        default="savedmodel",
        help="the format (default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=["keep", "none"],
        default="keep",
        help="none publishes features (default: %(default)s)",
    )
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
        help="default: sigmoid for 21843 classes, else softmax",
    )
    parser.add_argument(
        "--l2",
        type=float,
        default=0.0,
        help="factor of the kernels' squares in regularization_losses "
        "(default: none)",
    )
    parser.add_argument(
        "--numerics",
        choices=["source", *variants.NUMERICS],
        default="source",
        help="constants of a source instead of the checkpoint's own "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args) -> int:
    program.quiet_tensorflow()
    from bit_tf import labels
    from hub_export import saved_model

    class_labels = args.labels
    if class_labels == "none":
        class_labels = None
    elif class_labels != "auto" and class_labels not in labels.LABEL_SETS:
        try:
            text = pathlib.Path(class_labels).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise errors.ExportError(
                f"--labels names a file of UTF-8 text. Received: "
                f"{class_labels!r}: {error}"
            ) from error
        class_labels = labels.parse(text)
    print(f"Converting {args.source} …", file=sys.stderr)
    report = saved_model.convert(
        args.source,
        args.path,
        head=args.head == "keep",
        numerics=None if args.numerics == "source" else args.numerics,
        class_labels=class_labels,
        probabilities=args.probabilities,
        l2=args.l2,
        overwrite=args.overwrite,
    )
    if report["extra_arrays"]:
        print(
            "No part of BiT, and not used: "
            + ", ".join(report["extra_arrays"]),
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"path": args.path, **report}))
    else:
        print(
            f"{args.path}: {report['variables']} variables, signatures "
            f"{', '.join(report['signatures'])}; loaded back in a fresh "
            f"process: relative error {report['relative_error']:.1e}"
        )
    return 0
