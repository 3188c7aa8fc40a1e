"""`hub-export demo`: the whole path, on any machine."""

import pathlib

from bit_tf import presets
from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="the whole path on one machine",
        description="Converts a checkpoint, exports and verifies a SavedModel, "
        "loads it with hub.load and hub.KerasLayer, classifies and embeds "
        "pictures, and draws nearest neighbours. Without arguments it uses the "
        "package's own small checkpoint and held-out digits.",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "checkpoint",
        nargs="?",
        help="a checkpoint file, or a published name such as BiT-M-R50x1",
    )
    weights.add_argument(
        "--random",
        metavar="ARCHITECTURE",
        help="write and use random weights of that size, such as R50x1",
    )
    parser.add_argument(
        "--photo",
        action="append",
        default=[],
        help="a path or URL, may be repeated (default: held-out digits)",
    )
    parser.add_argument(
        "--preset",
        choices=[
            name
            for name, row in presets.PRESETS.items()
            if row.resize != "none"
        ],
        default="big_transfer eval",
        help="how photos are resized (default: %(default)s)",
    )
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        default=pathlib.Path("bit-tf-demo"),
        help="for what is made (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    program.quiet_tensorflow()
    from hub_export import demo

    demo.run(
        args.directory,
        checkpoint=args.checkpoint,
        random=args.random,
        photos=args.photo,
        preset=args.preset,
        say=lambda line: print(line, flush=True),
    )
    return 0
