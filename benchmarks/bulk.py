"""Apache Beam against the local engine, and two processes against one.

    python -m benchmarks.bulk --images 2000 --side 224

Makes the pictures and the model of benchmarks.embed, and embeds them by
embed_run.run, by bulk.run in one process, and by bulk.run in two, each in fresh
processes and in turns. Prints the wall time of each and the ratio of the second
to the first. Rates leave out what a start takes, of processes and of the model:
they come from the difference between all pictures and a tenth of them. Prints
the ratio of the third's rate to the second's, which has as many threads as
there are cores.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from typing import Any

from benchmarks import embed, processes

__all__ = ["main", "measure"]

WAYS: dict[str, list[str] | None] = {
    "local": None,
    "one process": ["--runner=DirectRunner"],
    "two processes": [
        "--runner=DirectRunner",
        "--direct_num_workers=2",
        "--direct_running_mode=multi_processing",
    ],
}


def measure(
    folder: str,
    output: str,
    model: str,
    side: int,
    batch: int,
    beam_options: list[str] | None,
) -> tuple[float, int]:
    """(wall seconds, vectors) of a run.

    Args:
      folder: of pictures.
      output: does not exist.
      model: a SavedModel directory.
      side: of the squares that pictures become.
      batch: pictures a batch.
      beam_options: None is the local engine.
    """
    from bit_tf import input_pipeline

    options: dict[str, Any] = {
        "model": model,
        "preset": input_pipeline.evaluation_preset(side),
        "batch": batch,
        "progress": False,
    }
    if beam_options is None:
        from bit_tf import embed_run

        summary = embed_run.run([folder], output, **options)
    else:
        from bit_tf import bulk

        summary = bulk.run(
            [folder], output, beam_options=beam_options, **options
        )
    return summary.seconds, summary.encoded


def _all(args, where: pathlib.Path) -> dict[str, Any]:
    model, pictures, few = where / "model", where / "all", where / "few"
    processes.fresh(embed.make_model, model, args.architecture)
    embed.make_pictures(pictures, args.images, args.seed)
    few.mkdir()
    for path in sorted(pictures.iterdir())[: max(1, args.images // 10)]:
        os.link(path, few / path.name)
    counts = {folder: len(os.listdir(folder)) for folder in (pictures, few)}
    seconds: dict[str, dict[pathlib.Path, list[float]]] = {
        way: {pictures: [], few: []} for way in WAYS
    }
    for _ in range(args.turns):
        for way, options in WAYS.items():
            for folder in (few, pictures):
                output = where / "out"
                wall, encoded = processes.fresh(
                    measure,
                    str(folder),
                    str(output),
                    str(model),
                    args.side,
                    args.batch,
                    options,
                )
                shutil.rmtree(output)
                if encoded != counts[folder]:
                    raise SystemExit(
                        f"{way}: {encoded} vectors of {counts[folder]} pictures"
                    )
                seconds[way][folder].append(wall)
    found: dict[str, Any] = {"cores": os.cpu_count(), "turns": args.turns}
    for way, taken in seconds.items():
        wall = statistics.median(taken[pictures])
        start = statistics.median(taken[few])
        found[way] = {
            "seconds": wall,
            "images_per_second": (counts[pictures] - counts[few])
            / (wall - start),
        }
    found["one_process_to_local"] = (
        found["one process"]["seconds"] / found["local"]["seconds"]
    )
    found["two_processes_to_one"] = (
        found["two processes"]["images_per_second"]
        / found["one process"]["images_per_second"]
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--architecture", default="R50x1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as where:
        found = _all(args, pathlib.Path(where))
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
