"""`bit-tf classify`: pictures → names and scores."""

import json
import os
import sys

from bit_tf import errors
from bit_tf.commands import embed, program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "classify",
        help="pictures to names and scores",
        description="Prints the likeliest classes of every picture.",
    )
    embed.add_pictures(parser)
    parser.add_argument(
        "--model",
        default="https://tfhub.dev/google/bit/m-r50x1/ilsvrc2012_classification/1",
        help="a model with a head: a TF-Hub handle, a SavedModel directory or "
        "a .tar.gz archive (default: %(default)s)",
    )
    parser.add_argument(
        "--top",
        type=program.positive,
        default=5,
        help="classes a picture (%(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line"
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    program.quiet_tensorflow()
    from bit_tf import classify

    classifier = classify.Classifier(args.model, preset=args.preset)
    failures = 0
    for image in args.images:
        source = os.fsencode(image).decode("utf-8", "backslashreplace")
        try:
            classes = classifier.classify(embed.read(image), top=args.top)
        except errors.ImageError as error:
            failures += 1
            print(f"bit-tf: error: {source}: {error}", file=sys.stderr)
            if args.json:
                print(json.dumps({"source": source, "error": str(error)}))
            continue
        if args.json:
            rows = [
                {"id": id_, "name": name, "score": score}
                for id_, name, score in classes
            ]
            print(json.dumps({"source": source, "classes": rows}))
            continue
        print(source)
        for id_, name, score in classes:
            print(f"  {score:8.4f}  {name}{f'  [{id_}]' if id_ else ''}")
    return 1 if failures else 0
