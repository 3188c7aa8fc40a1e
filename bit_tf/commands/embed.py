"""`bit-tf embed`: pictures → vectors."""

import json
import os
import sys

from bit_tf import errors, files
from bit_tf.commands import program

__all__ = ["add_pictures", "register"]


def add_pictures(parser) -> None:
    """Arguments that name pictures and how to prepare them."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a path, a URL, or - (stdin)"
    )
    parser.add_argument(
        "--preset",
        default="big_transfer eval",
        help="how pictures are resized; 'tfhub' keeps their size "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="pictures a batch (%(default)s)"
    )


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "embed",
        help="pictures to vectors",
        description="Writes the feature vector of every picture.",
    )
    add_pictures(parser)
    parser.add_argument(
        "--model",
        default="https://tfhub.dev/google/bit/m-r50x1/1",
        help="a TF-Hub handle, a SavedModel directory or a .tar.gz archive "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="-",
        help="FILE.parquet, FILE.npy, or - for one JSON object a line "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    write = _writer(args.output)
    program.quiet_tensorflow()
    from bit_tf import embed

    encoder = embed.BitMedium2Vec(args.model, preset=args.preset)
    from tqdm import tqdm

    results = []
    failures = 0
    sources = [os.fspath(image) for image in args.images]
    vectors = encoder.iterate(
        (read(image) for image in args.images),
        chunks=args.batch,
        on_error="return",
    )
    for source, vector in tqdm(
        zip(sources, vectors, strict=True),
        total=len(sources),
        unit="image",
        disable=None if len(sources) > 1 else True,
    ):
        if isinstance(vector, errors.ImageError):
            failures += 1
            print(f"bit-tf: error: {source}: {vector}", file=sys.stderr)
        results.append((source, vector))
    write(results, encoder, args.preset)
    return 1 if failures else 0


def read(image: str):
    """A command line's picture: "-" is stdin."""
    return sys.stdin.buffer.read() if image == "-" else image


def _writer(output: str):
    if output == "-":
        return _write_json
    suffix = os.path.splitext(output)[1]
    writers = {".parquet": _write_parquet, ".npy": _write_npy}
    if suffix not in writers:
        raise errors.UnknownNameError(
            "--output must end in .parquet or .npy, or be - for JSON lines. "
            f"Received: {output!r}."
        )
    if suffix == ".parquet":
        errors.import_extra("pyarrow.parquet", "parquet")

    def write(results, encoder, preset):
        with files.new_file(output) as file:
            writers[suffix](file, results, encoder, preset)

    return write


def _write_json(results, encoder, preset) -> None:
    for source, vector in results:
        row: dict = {"source": source}
        if isinstance(vector, errors.ImageError):
            row["error"] = str(vector)
        else:
            row["embedding"] = vector
        print(json.dumps(row))


def _write_npy(file, results, encoder, preset) -> None:
    import numpy as np

    bad = [s for s, v in results if isinstance(v, errors.ImageError)]
    if bad:
        raise errors.ImageDecodeError(
            "A .npy file holds one vector for every picture, and "
            f"{len(bad)} of {len(results)} could not be read. Nothing was "
            "written; leave them out, or write .parquet, which has a column "
            "for errors."
        )
    np.save(file, np.asarray([v for _, v in results], np.float32))


def _write_parquet(file, results, encoder, preset) -> None:
    arrow = errors.import_extra("pyarrow", "parquet")
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    bad = [isinstance(v, errors.ImageError) for _, v in results]
    pairs = list(zip(results, bad, strict=True))
    schema = arrow.schema(
        [
            ("source", arrow.string()),
            ("embedding", arrow.list_(arrow.float32(), encoder.vector_length)),
            ("error", arrow.string()),
        ],
        metadata={"model": encoder.model_url, "preset": preset},
    )
    columns = [
        [source for source, _ in results],
        [None if failed else vector for (_, vector), failed in pairs],
        [str(error) if failed else None for (_, error), failed in pairs],
    ]
    arrays = [
        arrow.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    parquet.write_table(arrow.Table.from_arrays(arrays, schema=schema), file)
