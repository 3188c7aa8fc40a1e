"""`bit-tf embed`: pictures → vectors."""

import argparse
import json
import os
import sys

from bit_tf import errors, files, presets
from bit_tf.commands import program

__all__ = ["add_pictures", "register"]


def add_pictures(parser) -> None:
    """Arguments that name pictures and how to prepare them."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a path, a URL, or - (stdin)"
    )
    parser.add_argument(
        "--preset",
        choices=list(presets.PRESETS),
        help="how pictures are resized; 'tfhub' keeps their size (default: as "
        "the model's card says, or else 'big_transfer eval')",
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
        type=_output,
        default="-",
        help="FILE.parquet, FILE.npy, or - for one JSON object a line "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=program.positive,
        default=8,
        help="pictures a batch (%(default)s)",
    )
    parser.set_defaults(run=run)


def _output(text: str) -> str:
    """An --output that can be written, told before any work is done."""
    folder = os.path.dirname(os.path.abspath(text))
    if text != "-" and os.path.splitext(text)[1] not in (".parquet", ".npy"):
        raise argparse.ArgumentTypeError(
            f"must end in .parquet or .npy, or be - for JSON lines, not {text}"
        )
    if text != "-" and not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{folder} is not a directory")
    return text


def run(args) -> int:
    if args.output.endswith(".parquet"):
        errors.import_extra("pyarrow.parquet", "parquet")
    program.quiet_tensorflow()
    from tqdm import tqdm

    from bit_tf import embed, hub
    from bit_tf.checkpoints import tf_hub

    preset = (
        args.preset
        or tf_hub.recorded_preset(hub.resolve(args.model))
        or "big_transfer eval"
    )
    encoder = embed.BitMedium2Vec(args.model, preset=preset)
    vectors = encoder.iterate(
        (read(image) for image in args.images),
        chunks=args.batch,
        on_error="return",
    )
    failures = 0
    results = []
    for image, vector in tqdm(
        zip(args.images, vectors, strict=True),
        total=len(args.images),
        unit="image",
        disable=None if len(args.images) > 1 else True,
    ):
        # A file's name may hold bytes that are no text.
        source = os.fsencode(image).decode("utf-8", "backslashreplace")
        if isinstance(vector, errors.ImageError):
            failures += 1
            print(f"bit-tf: error: {source}: {vector}", file=sys.stderr)
        if args.output == "-":
            _print_json(source, vector, encoder)
        else:
            results.append((source, vector))
    if args.output != "-":
        with files.new_file(args.output) as file:
            if args.output.endswith(".npy"):
                _write_npy(file, results)
            else:
                _write_parquet(file, results, encoder)
    return 1 if failures else 0


def read(image: str):
    """A command line's picture: "-" is stdin."""
    return sys.stdin.buffer.read() if image == "-" else image


def _print_json(source, vector, encoder) -> None:
    row: dict = {"source": source}
    if isinstance(vector, errors.ImageError):
        row["error"] = str(vector)
    else:
        row["embedding"] = vector
        row["model"] = encoder.model_url
        row["preset"] = encoder.preset.name
    print(json.dumps(row), flush=True)


def _write_npy(file, results) -> None:
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


def _write_parquet(file, results, encoder) -> None:
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
        metadata={
            "model": encoder.model_url,
            "preset": encoder.preset.name,
        },
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
