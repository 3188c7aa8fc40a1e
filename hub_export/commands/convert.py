"""`hub-export convert`: checkpoint → SavedModel, or another format."""

import json
import sys

from bit_tf.commands import program
from hub_export.commands import options

__all__ = ["register"]

# The same as hub_export.formats.FORMATS, which would load NumPy for --help.
TO = ("savedmodel", "npz", "timm", "transformers", "keras", "keras-folded")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="checkpoint to SavedModel or another format",
        description="Converts a checkpoint, in any format that is read, into a "
        "SavedModel for hub.load, hub.KerasLayer and TF Serving, or into "
        "another checkpoint format. The result is loaded back and checked "
        "before it appears, a SavedModel in a fresh process.",
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="the checkpoint: a path, a published name such as BiT-M-R50x1 or "
        "google/bit-50, hf://owner/name, or a URL",
    )
    parser.add_argument(
        "path", metavar="OUT", help="the directory or file to make"
    )
    parser.add_argument(
        "--to",
        choices=TO,
        default="savedmodel",
        help="npz is Google's; timm one .safetensors file; transformers a "
        "Hugging Face directory; keras this package's model; keras-folded a "
        "model of Keras' own layers (default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=["keep", "none"],
        default="keep",
        help="none publishes features (default: %(default)s)",
    )
    options.add(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    program.add_relocate(parser)
    parser.set_defaults(run=run)


def run(args) -> int:
    if args.to != "savedmodel" and (args.l2 or args.probabilities):
        print(
            "hub-export convert: error: --l2 and --probabilities are for "
            f"--to savedmodel, not for {args.to}",
            file=sys.stderr,
        )
        return 2
    if args.to in ("savedmodel", "keras-folded"):
        program.quiet_tensorflow()
    else:
        program.expect_tensorflow(args.source)
    from bit_tf import published
    from bit_tf.checkpoints import layout
    from hub_export import formats, sources

    asked = {
        "head": args.head == "keep",
        "numerics": options.numerics(args.numerics),
        "class_labels": options.class_labels(args.labels),
        "overwrite": args.overwrite,
    }
    print(f"Converting {published.shown(args.source)} …", file=sys.stderr)
    if args.to == formats.SAVED_MODEL:
        from hub_export import saved_model

        around = sources.around_saved_model(args.source)
        if around is not None:
            print(f"Note: {around.note()}", file=sys.stderr)
        report = saved_model.convert(
            args.source,
            args.path,
            probabilities=args.probabilities,
            l2=args.l2,
            **asked,
        )
    else:
        report = formats.convert(args.source, args.path, args.to, **asked)
    for note in report["notes"]:
        print(f"Note: {note}", file=sys.stderr)
    if report["extra_arrays"]:
        print(
            "No part of BiT, and not used: "
            + ", ".join(map(layout.printable, report["extra_arrays"])),
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"path": args.path, **report}))
    else:
        print(
            f"Read as {report['format']}: {report['arrays']} arrays, each used "
            f"once; constants of {report['numerics'] or 'the SavedModel'}."
        )
        if args.to == formats.SAVED_MODEL:
            print(
                f"{args.path}: {report['variables']} variables, signatures "
                f"{', '.join(report['signatures'])}; loaded back in a fresh "
                f"process: relative error {report['relative_error']:.1e}"
            )
        else:
            print(f"{args.path}: {args.to}, {report['bytes']} bytes, read back")
    return 0
