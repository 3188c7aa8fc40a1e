"""`bit-tf models`: what was published."""

import dataclasses
import json

from bit_tf import variants

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "models",
        help="list published weights",
        description="Lists published BiT weights and what is known of them.",
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="BiT-*",
        help="a shell pattern, such as 'vtab/*-dtd', or '*' for all "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args) -> int:
    rows = variants.list_models(args.pattern)
    if args.json:
        print(
            json.dumps(
                [dataclasses.asdict(r) | {"params": r.params} for r in rows],
                indent=2,
            )
        )
        return 0
    table = [("NAME", "FEATURES", "CLASSES", "PARAMS", "PIXELS", "WHERE")]
    for row in rows:
        table.append(
            (
                row.name,
                str(variants.architecture(row.architecture).feature_dim),
                str(row.num_classes or "-"),
                f"{row.params / 1e6:.1f}M",
                str(row.resolution),
                row.handle or row.feature_handle or row.repository or "-",
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    for line in table:
        cells = [c.ljust(w) for c, w in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[5]]))
    return 0
