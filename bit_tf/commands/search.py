"""`bit-tf search`: a picture → those of an index that are most like it."""

import json
import os
import sys

from bit_tf import download, errors, files
from bit_tf.commands import index as index_command
from bit_tf.commands import program

__all__ = ["register"]

_ID = "id:"


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "search",
        help="find pictures like one",
        description="Prints the pictures of an index that are most like one, "
        "with the cosine of their vectors (extra 'index').",
    )
    parser.add_argument(
        "query",
        metavar="QUERY",
        help="a path, a URL, - (stdin), or id:ID of a row of the index",
    )
    index_command.add_index(parser)
    parser.add_argument(
        "-k",
        type=program.positive,
        default=10,
        metavar="COUNT",
        help="how many pictures (%(default)s)",
    )
    parser.add_argument(
        "--where",
        metavar="SQL",
        help='which rows, by their columns, such as "width > 500 AND source '
        "LIKE '%%cat%%'\"",
    )
    parser.add_argument(
        "--model",
        metavar="HANDLE",
        help="where the index's model is now (default: where it was)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line"
    )
    index_command.add_page(parser)
    parser.set_defaults(run=run)


def run(args) -> int:
    from bit_tf import index

    opened = index.open(args.index)
    data = None
    name = os.fsencode(args.query).decode("utf-8", "backslashreplace")
    if args.query.startswith(_ID):
        row = opened.row(name.removeprefix(_ID))
        name, vector = row.source, row.embedding
    else:
        try:
            data = _read(args.query)
            vector = _embed(data, opened, args)
        except errors.ImageError as error:
            raise type(error)(f"{name}: {error}") from error
    hits = opened.search(vector, args.k, args.where)
    from bit_tf import search_page

    if args.html:
        page = search_page.results(
            name,
            data,
            hits,
            opened.facts,
            where=args.where,
            fetch=args.fetch,
            data_dir=args.data_dir,
        )
        with files.new_file(args.html) as file:
            file.write(page.encode())
    for score, row in hits:
        if args.json:
            print(json.dumps(_plain(score, row)))
            continue
        line = f"{score:8.4f}  {search_page.printable(row.id)}"
        if row.names:
            line += f"  {search_page.printable(row.names[0])}"
        print(line)
    return 0


def _read(query: str) -> bytes:
    if query == "-":
        return sys.stdin.buffer.read(download.MAX_BYTES + 1)
    return download.read_source(query)


def _embed(data: bytes, opened, args):
    """The query's vector, by the model and the preset of the index."""
    program.quiet_tensorflow()
    from bit_tf import embed_model

    facts = opened.facts
    encoder = embed_model.Encoder(
        args.model or facts.model, facts.preset, precision=facts.precision
    )
    found = encoder.facts().model_hash
    if found != facts.model_hash:
        raise errors.DatasetError(
            "A query is embedded with the model of the index. Received: "
            f"{(args.model or facts.model)!r} with the hash {found[:12]}…, "
            f"which is another than that of {args.index!r}, "
            f"{facts.model_hash[:12]}…. Say with --model where the index's "
            "model is, or embed the pictures anew with this one."
        )
    (encoded,) = encoder.encode([encoder.prepare(data)])
    return encoded.embedding


def _plain(score: float, row) -> dict:
    """A hit as JSON has it."""
    cells = row._asdict()
    del cells["embedding"], cells["error"]
    if row.names is None:
        del cells["names"], cells["scores"]
    return {"score": score} | cells
