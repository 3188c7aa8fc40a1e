"""`bit-tf embed`: pictures → vectors."""

import argparse
import collections
import dataclasses
import json
import os
import sys

from bit_tf import errors, files, presets
from bit_tf.commands import program

__all__ = ["add_pictures", "add_preset", "register"]

_DESCRIPTION = """\
Writes the feature vector of every picture.

--output DIR is for many: it holds part-*.parquet, with a row for each picture,
and what the run needs to go on. It may be stopped at any time; the same command
does what is missing. Exits with 1 if a row got an error instead of a vector.
"""

_FILES = (".parquet", ".npy")
# What looks like a directory's name, and was meant as a file.
_OTHER_FILES = (
    *(".arrow", ".csv", ".feather", ".h5", ".json", ".jsonl", ".npz", ".pq"),
    *(".tar", ".tsv", ".txt"),
)
_OF_TABLES = (
    *("shard", "float16", "top", "retry_errors", "overwrite", "json"),
    "runner",
)


def add_pictures(parser) -> None:
    """Arguments that name pictures and how to prepare them."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a path, a URL, or - (stdin)"
    )
    add_preset(parser)


def add_preset(parser) -> None:
    """The argument that says how pictures are prepared."""
    parser.add_argument(
        "--preset",
        choices=list(presets.PRESETS),
        help="how pictures are resized; 'tfhub' keeps their size (default: as "
        "the model's card says, or else 'big_transfer eval')",
    )


def add_precision(parser) -> None:
    """The argument that says what the model multiplies in."""
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of convolutions; bfloat16 is quicker on a processor that has it, "
        "and vectors differ by about 1 %% (%(default)s)",
    )


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "embed",
        help="pictures to vectors",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a picture, a folder, a glob, a list (.txt, .csv, .tsv, .parquet) "
        "of paths or URLs, a .tar archive, a URL, tfds:NAME; or - (a picture "
        "on stdin, not for a directory)",
    )
    add_preset(parser)
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
        metavar="DIR",
        help="a directory of Parquet shards; or FILE.parquet or FILE.npy, of "
        "what fits in memory; or - for one JSON object a line (default: "
        "%(default)s)",
    )
    add_precision(parser)
    parser.add_argument(
        "--batch",
        type=program.positive,
        default=8,
        help="pictures a batch (%(default)s)",
    )
    found = parser.add_argument_group("what sources hold")
    found.add_argument(
        "--column",
        metavar="NAME",
        help="of a list's paths or URLs, or of a dataset's pictures",
    )
    found.add_argument(
        "--split", metavar="NAME", help="of a dataset (all), as TFDS writes it"
    )
    found.add_argument(
        "--data-dir", metavar="DIR", help="of TensorFlow Datasets"
    )
    network = parser.add_argument_group("reading URLs")
    network.add_argument(
        "--connections",
        type=program.positive,
        default=32,
        help="at once (%(default)s)",
    )
    network.add_argument(
        "--per-host",
        type=program.positive,
        default=8,
        help="at once, of one host (%(default)s)",
    )
    network.add_argument(
        "--retries",
        type=_count,
        default=3,
        help="of what may pass, such as status 503 (%(default)s)",
    )
    network.add_argument(
        "--timeout",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="a picture (%(default)g)",
    )
    table = parser.add_argument_group("--output DIR")
    table.add_argument(
        "--shard", type=program.positive, help="rows a file (1024)"
    )
    table.add_argument(
        "--float16",
        action="store_true",
        default=None,
        help="keep vectors in half precision",
    )
    table.add_argument(
        "--top",
        type=_count,
        metavar="K",
        help="classes a picture, of a model with classes (5); 0 is none",
    )
    table.add_argument(
        "--retry-errors",
        action="store_true",
        default=None,
        help="do rows with an error again",
    )
    table.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="make all that DIR has anew",
    )
    table.add_argument(
        "--json",
        action="store_true",
        default=None,
        help="print the summary as JSON",
    )
    table.add_argument(
        "--runner",
        help="run as an Apache Beam pipeline, with any options of Beam: "
        "DirectRunner, PortableRunner, DataflowRunner, FlinkRunner, ...",
    )
    parser.set_defaults(run=run, takes_rest="runner")


def _count(text: str) -> int:
    """An argument that is a whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return number


def _seconds(text: str) -> float:
    """An argument that is the longest time for one URL."""
    from bit_tf import fetching

    number = float(text)
    if not 0 < number <= fetching.LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"must be above 0 and at most {fetching.LONGEST_TIMEOUT}, "
            f"not {text}"
        )
    return number


def _is_directory(output: str) -> bool:
    """Whether --output names a directory: all that is not - or a file."""
    if output == "-":
        return False
    suffix = os.path.splitext(output)[1].lower()
    return suffix not in _FILES or os.path.isdir(output)


def _output(text: str) -> str:
    """An --output that can be written, told before any work is done."""
    if text == "-":
        return text
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if _is_directory(text):
        suffix = os.path.splitext(text)[1].lower()
        if suffix in _OTHER_FILES and not os.path.isdir(text):
            raise argparse.ArgumentTypeError(
                "must be a directory, end in .parquet or .npy, or be - for "
                f"JSON lines, not {text}"
            )
        return text
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{folder} is not a directory")
    return text


def run(args) -> int:
    from bit_tf import items

    items.require_use(args.sources, column=args.column, split=args.split)
    if _is_directory(args.output):
        return _run_table(args)
    given = [name for name in _OF_TABLES if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise errors.BitTfError(
            f"{options} {'need' if len(given) > 1 else 'needs'} --output DIR. "
            f"Received: --output {args.output}. Name a directory, or leave "
            "what needs one out."
        )
    return _run_list(args)


def _run_table(args) -> int:
    """Embeds into a directory."""
    if "-" in args.sources:
        raise errors.DatasetError(
            "Pictures of a directory of vectors can be read again. Received: "
            "- (stdin). Save it to a file, or leave out --output DIR."
        )
    errors.import_extra("pyarrow.parquet", "parquet")
    if "://" not in args.output:
        program.require_directory(args.output)
    program.quiet_tensorflow()
    options = {
        "model": args.model,
        "preset": args.preset,
        "precision": args.precision,
        "batch": args.batch,
        "shard": args.shard or 1024,
        "float16": bool(args.float16),
        "top": args.top,
        "retry_errors": bool(args.retry_errors),
        "overwrite": bool(args.overwrite),
        "column": args.column,
        "data_dir": args.data_dir,
        "split": args.split,
        **_reader_options(args),
    }
    if args.runner is None:
        from bit_tf import embed_run

        summary = embed_run.run(args.sources, args.output, **options)
    else:
        from bit_tf import bulk

        beam_options = [f"--runner={args.runner}", *args.rest]
        summary = bulk.run(
            args.sources, args.output, beam_options=beam_options, **options
        )
    print(f"bit-tf: {summary}", file=sys.stderr)
    for source, error in summary.first_errors:
        print(f"bit-tf: error: {source}: {error}", file=sys.stderr)
    others = summary.errors - len(summary.first_errors)
    if summary.first_errors and others:
        print(
            f"bit-tf: {others} other errors are in the column error",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(summary)))
    return 1 if summary.errors else 0


def _reader_options(args) -> dict:
    return {
        "connections": args.connections,
        "per_host": args.per_host,
        "retries": args.retries,
        "timeout": args.timeout,
    }


def _run_list(args) -> int:
    """Embeds to stdout, or into one file."""
    suffix = os.path.splitext(args.output)[1].lower()
    if suffix == ".parquet":
        errors.import_extra("pyarrow.parquet", "parquet")
    program.quiet_tensorflow()
    from tqdm import tqdm

    from bit_tf import embed, embed_model, hub, items
    from bit_tf.checkpoints import tf_hub

    named = [
        items.find(
            [source],
            column=args.column,
            data_dir=args.data_dir,
            split=args.split,
        )
        if _holds_many(source) or _is_url(source)
        else source
        for source in args.sources
    ]
    preset = (
        args.preset
        or tf_hub.recorded_preset(hub.resolve(args.model))
        or embed_model.DEFAULT_PRESET
    )
    encoder = embed.BitMedium2Vec(
        args.model, preset=preset, precision=args.precision
    )
    failures = 0
    results = []
    waiting: collections.deque[str] = collections.deque()

    def pictures(reader):
        for one in named:
            if isinstance(one, str):
                # A file's name may hold bytes that are no text.
                shown = os.fsencode(one).decode("utf-8", "backslashreplace")
                waiting.append(shown)
                yield read(one)
                continue
            for item, data in reader.read_all(one):
                waiting.append(item.source)
                yield data

    single = not any(map(_holds_many, args.sources))
    with items.Reader(**_reader_options(args)) as reader:
        for vector in tqdm(
            encoder.iterate(
                pictures(reader), chunks=args.batch, on_error="return"
            ),
            total=len(named) if single else None,
            unit="image",
            disable=True if single and len(named) == 1 else None,
        ):
            source = waiting.popleft()
            if isinstance(vector, errors.ImageError):
                failures += 1
                print(f"bit-tf: error: {source}: {vector}", file=sys.stderr)
            if args.output == "-":
                _print_json(source, vector, encoder)
            else:
                results.append((source, vector))
    if args.output != "-":
        with files.new_file(args.output) as file:
            if suffix == ".npy":
                _write_npy(file, results)
            else:
                _write_parquet(file, results, encoder)
    return 1 if failures else 0


def _holds_many(source: str) -> bool:
    """Whether a source is more than one picture, or not one itself."""
    from bit_tf import item_lists, picture_paths

    if source[:5].lower() == "tfds:" or os.path.isdir(source):
        return True
    if os.path.lexists(source):
        return source.lower().endswith((*item_lists.SUFFIXES, ".tar"))
    return "://" not in source and picture_paths.is_pattern(source)


def _is_url(source: str) -> bool:
    """Whether a source is a picture that items.Reader fetches."""
    return source.lower().startswith(("http://", "https://"))


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
        row["precision"] = encoder.precision
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
            "precision": encoder.precision,
        },
    )
    # As in embedding_table: d nulls are no vector.
    missing = [None] * encoder.vector_length
    columns = [
        [source for source, _ in results],
        [missing if failed else vector for (_, vector), failed in pairs],
        [str(error) if failed else None for (_, error), failed in pairs],
    ]
    arrays = [
        arrow.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    parquet.write_table(arrow.Table.from_arrays(arrays, schema=schema), file)
