"""`hub-export verify`: is a model what it should be?"""

import json
import sys

from bit_tf import errors
from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check models, archives and repositories",
        description="Checks a model's hash, files, operations, interface with "
        "a step of training, golden values, card and page. A graph is loaded "
        "in a process of its own, unless one of its operations opens files, "
        "runs Python or reaches other machines. Exit code 1 if anything "
        "failed.",
    )
    parser.add_argument(
        "targets",
        metavar="TARGET",
        nargs="+",
        help="a handle (https://…), a SavedModel's directory, a .tar.gz "
        "archive, or a repository, or a model or version in it",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="load no graph: hash, files, operations and page only",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args) -> int:
    program.quiet_tensorflow()
    from bit_tf.checkpoints import layout
    from hub_export import verification

    reports, faults = [], []
    for target in args.targets:
        try:
            found = verification.verify(target, quick=args.quick)
        except (errors.BitTfError, OSError) as error:
            faults.append(str(error))
            print(
                f"hub-export verify: error: {layout.printable(str(error))}",
                file=sys.stderr,
            )
            continue
        reports += found
        if not args.json:
            for report in found:
                print(report.table(), flush=True)
    ok = not faults and all(report.ok for report in reports)
    if args.json:
        print(
            json.dumps(
                {
                    "ok": ok,
                    "reports": [report.to_dict() for report in reports],
                    "errors": faults,
                }
            )
        )
    return 0 if ok else 1
