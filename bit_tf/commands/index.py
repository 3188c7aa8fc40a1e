"""`bit-tf index`: vectors → a directory that can be searched."""

import argparse
import dataclasses
import json
import sys

from bit_tf import files

__all__ = ["add_index", "add_page", "register"]


def add_index(parser) -> None:
    """The argument that names an index."""
    parser.add_argument(
        "--index",
        required=True,
        metavar="DIR",
        help="the directory of the index",
    )


def add_page(parser) -> None:
    """Arguments of an HTML page with pictures."""
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a page with the pictures, which needs nothing beside it",
    )
    parser.add_argument(
        "--fetch",
        action="store_true",
        help="fetch pictures of the page that are URLs; others may learn by "
        "it what is searched for",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="of TensorFlow Datasets, for pictures of the page",
    )


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "index",
        help="make vectors searchable",
        description="Keeps vectors so that they can be searched (extra "
        "'index').",
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    build = actions.add_parser(
        "build",
        help="make an index",
        description="Makes an index of what bit-tf embed wrote.",
    )
    _add_vectors(build)
    build.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an index that is there",
    )
    build.set_defaults(run=_build)
    add = actions.add_parser(
        "add",
        help="add to an index",
        description="Adds what bit-tf embed wrote: all of it, or nothing. A "
        "row replaces one of the same id with another picture or vector.",
    )
    _add_vectors(add)
    add.set_defaults(run=_add)
    stats = actions.add_parser(
        "stats",
        help="say what is in an index",
        description="Says how many rows there are, of which model, and how "
        "they are searched.",
    )
    add_index(stats)
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_stats)
    duplicates = actions.add_parser(
        "duplicates",
        help="find pictures that are nearly the same",
        description="Prints groups of pictures whose vectors are nearly the "
        "same, the largest first.",
    )
    add_index(duplicates)
    duplicates.add_argument(
        "--threshold",
        type=_cosine,
        default=0.95,
        help="the cosine from which two are in a group (%(default)s)",
    )
    duplicates.add_argument(
        "--json", action="store_true", help="print one JSON object a group"
    )
    add_page(duplicates)
    duplicates.set_defaults(run=_duplicates)


def _add_vectors(parser) -> None:
    parser.add_argument(
        "vectors",
        nargs="+",
        metavar="VECTORS",
        help="a directory that bit-tf embed wrote, or a Parquet file",
    )
    add_index(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _cosine(text: str) -> float:
    """An argument that is above 0, up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], not {text}")
    return number


def _build(args) -> int:
    from bit_tf import index

    counts = index.build(args.vectors, args.index, overwrite=args.overwrite)
    return _report(counts, args.json)


def _add(args) -> int:
    from bit_tf import index

    return _report(index.add(args.vectors, args.index), args.json)


def _report(counts, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(counts)))
        return 0
    print(
        f"{counts.added} added, {counts.replaced} replaced, {counts.same} "
        f"there already, {counts.errors} without a vector left out"
    )
    return 0


def _stats(args) -> int:
    from bit_tf import index, search_page

    opened = index.open(args.index)
    stats, facts = opened.stats(), opened.facts
    if args.json:
        row = dataclasses.asdict(stats) | {"facts": dataclasses.asdict(facts)}
        print(json.dumps(row, indent=2))
        return 0
    how = "exact"
    if stats.num_partitions:
        how = (
            f"IVF-PQ of {stats.num_partitions} partitions and "
            f"{stats.num_sub_vectors} bytes a vector for {stats.indexed} "
            f"rows, exact for {stats.unindexed}"
        )
    for name, value in (
        ("rows", stats.rows),
        ("search", how),
        ("bytes", f"{stats.bytes}, of the IVF-PQ index {stats.index_bytes}"),
        ("model", facts.model),
        ("model hash", facts.model_hash),
        ("preset", facts.preset.name),
        ("vectors", f"{facts.dim} × float{16 if facts.float16 else 32}"),
        ("precision", f"{facts.precision} in convolutions"),
        ("classes", facts.top),
        ("version", f"bit-tf {facts.version}"),
    ):
        print(f"{name:12}{search_page.printable(str(value))}")
    return 0


def _duplicates(args) -> int:
    from bit_tf import index, search_page

    opened = index.open(args.index)
    groups = opened.near_duplicates(args.threshold)
    if args.html:
        page = search_page.duplicates(
            groups,
            opened.facts,
            args.threshold,
            fetch=args.fetch,
            data_dir=args.data_dir,
        )
        with files.new_file(args.html) as file:
            file.write(page.encode())
    for number, group in enumerate(groups, 1):
        if args.json:
            members = [
                {
                    "id": member.row.id,
                    "source": member.row.source,
                    "sha256": member.row.sha256,
                    "score": member.score,
                    "same_file": member.same_file,
                }
                for member in group.members
            ]
            print(json.dumps({"group": number, "members": members}))
            continue
        print(f"group {number}: {len(group.members)} pictures")
        for member in group.members:
            note = "  (same file)" if member.same_file else ""
            shown = search_page.printable(member.row.id)
            print(f"  {member.score:8.4f}  {shown}{note}")
    if not groups:
        print(
            f"No two of {len(opened)} pictures have a cosine of "
            f"{args.threshold:g} or more.",
            file=sys.stderr,
        )
    return 0
