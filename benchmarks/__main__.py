"""Benchmarks of speed: `python -m benchmarks NAME [--quick] [--output DIR]`.

    inference   pictures to features, against every peer that is installed
    training    a step of fine-tuning, against transformers in torch
    startup     seconds from the start of Python to the first vector
    embed       a folder of JPEGs to vectors, and its parts alone
    export      time and memory of making a SavedModel, by architecture
    settings    what TensorFlow's settings do to it
    scaling     how time grows with pixels and with the batch
    gpu         features and training on a GPU: the Keras model on JAX against
                torch; says so where there is none
    all         these eight

Peers come with `pip install -c constraints.txt 'bit-tf[bench]'`; those that are
not installed are named and left out. Every table is printed as markdown, and
written with all numbers as JSON where --output names a folder. --quick runs a
tiny network once: it shows that everything works, and its times say nothing.

The other modules of this folder have command lines of their own.
"""

import argparse
import logging
import os
import pathlib
import sys
import tempfile

NAMES = (
    *("inference", "training", "startup", "embed", "export"),
    *("settings", "scaling", "gpu"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs what was named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("name", choices=[*NAMES, "all"], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
    args = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in NAMES if args.name == "all" else [args.name]:
        run(name, args.quick, args.output)
    return 0


def run(name: str, quick: bool, output: pathlib.Path | None) -> None:
    """Runs one benchmark, and prints and writes what it found."""
    from benchmarks import (
        embed,
        export,
        gpu,
        inference,
        scaling,
        settings,
        startup,
        timing,
        training,
    )

    measure = {
        "inference": inference.measure,
        "training": training.measure,
        "startup": startup.measure,
        "embed": embed.measure,
        "export": export.measure,
        "settings": settings.measure,
        "scaling": scaling.measure,
        "gpu": gpu.measure,
    }[name]
    options = {}
    if quick:
        options = {
            "inference": {
                "architecture": "testing",
                "shapes": ((2, 32, 1),),
                "compiled": False,
            },
            "training": {
                "architecture": "testing",
                "batch": 2,
                "side": 32,
                "rounds": 1,
                "compiled": False,
            },
            "startup": {"architecture": "testing", "rounds": 1},
            "scaling": {
                "architecture": "testing",
                "sides": (32, 48),
                "batches": (1, 2),
                "rounds": 1,
            },
            "embed": {"architecture": "testing", "images": 8, "side": 32},
            "export": {"architectures": ("testing",)},
            "settings": {
                "architecture": "testing",
                "batches": (1,),
                "turns": 1,
            },
            "gpu": {},
        }[name]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(pathlib.Path(folder), **options)
    if "unavailable" in found:
        print(found["unavailable"])
        return
    timing.write(output, name, found)
    if found.get("not_installed"):
        logging.warning(
            "Not installed, and left out: %s. They come with: pip install -c "
            "constraints.txt 'bit-tf[bench]'",
            ", ".join(found["not_installed"]),
        )
    if name == "scaling" and output is not None:
        scaling.plot(found, output / "scaling.png")


if __name__ == "__main__":
    sys.exit(main())
