"""`bit-tf inspect`: what a checkpoint holds."""

import json
import sys

from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what a checkpoint holds",
        description="Tells a checkpoint's format, architecture, head and "
        "constants, and lists its arrays with statistics. Exits with 1 if it "
        "is damaged, not BiT's, or holds NaN or infinity.",
    )
    parser.add_argument(
        "source",
        metavar="FILE",
        help="a checkpoint in any format that is read, or a published name",
    )
    parser.add_argument(
        "--no-values",
        dest="values",
        action="store_false",
        help="read names and shapes alone, no statistics",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args) -> int:
    program.expect_tensorflow(args.source)
    from bit_tf import published
    from bit_tf.checkpoints import inspection

    report = inspection.inspect(
        published.open_checkpoint(args.source), values=args.values
    )
    if args.json:
        print(json.dumps(report, allow_nan=False))
    else:
        print("\n".join(_lines(report)))
    if report["finite"] is False:
        print("It holds values that are not finite.", file=sys.stderr)
        return 1
    return 0


def _lines(report: dict):
    from bit_tf.checkpoints import layout

    constants = report["numerics"]
    head = "none"
    if report["num_classes"]:
        labels = "with" if report["labels"] else "without"
        head = f"{report['num_classes']} classes, {labels} names in the file"
    blocks = ", ".join(map(str, report["blocks"]))
    preset = report["preset"]
    for key, value in (
        ("file", report["path"]),
        ("format", f"{report['format']}, {report['bytes']} bytes"),
        (
            "architecture",
            f"{report['architecture'] or 'not a published one'}: units "
            f"{blocks}; stem {report['stem_width']}; features "
            f"{report['feature_dim']}; output stride {report['output_stride']}",
        ),
        ("head", head),
        ("parameters", report["params"]),
        (
            "numerics",
            f"{constants['name']}: epsilons {constants['ws_epsilon']:g} "
            f"(kernels) and {constants['gn_epsilon']:g} (groups); pooling's "
            f"border {constants['pool_border']}",
        ),
        ("pictures", preset["name"] if preset else "preset unknown"),
        ("arrays", f"{len(report['arrays'])}, each used once"),
        (
            "not used",
            ", ".join(map(layout.printable, report["extra"])) or "nothing",
        ),
    ):
        yield f"{key + ':':13} {value}"
    for note in report["notes"]:
        yield f"{'note:':13} {note}"
    yield ""
    header = ["NAME", "IN THE FILE", "DTYPE", "SHAPE"]
    if report["finite"] is not None:
        header += ["MIN", "MAX", "MEAN", "STD", "NOT FINITE"]
    rows = [header]
    for array in report["arrays"]:
        cells = [
            array["name"],
            "same"
            if array["source"] == array["name"]
            else layout.printable(array["source"]),
            array["dtype"],
            "×".join(map(str, array["shape"])),
        ]
        if "nan" in array:
            cells += [
                *(_number(array[key]) for key in ("min", "max", "mean", "std")),
                str(array["nan"] + array["infinite"] or "-"),
            ]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
