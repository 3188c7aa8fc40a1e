"""Time and peak memory of converting an architecture, at full size.

    python -m benchmarks.memory R152x4 --classes 21843 --directory /tmp/big
    python -m benchmarks.memory R152x4 --to timm keras transformers npz \\
        --directory /tmp/big

Writes random weights in the published layout, runs `hub-export convert` on
them, once for every format named, each time on what the last one made, and
watches every process of it, the verifier included, through Linux' /proc.
Prints each one's peak and its ratio to the larger of what is read and written.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from bit_tf import variants


def peak_bytes(pid: int) -> int:
    """The largest resident size that a process has reached, in bytes."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def children(pid: int) -> list[int]:
    """The process and all its descendants."""
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    found = [pid]
    for child in path.read_text().split():
        found += children(int(child))
    return found


def watch(command: list[str]) -> tuple[float, dict[str, int]]:
    """Runs a command: (seconds, {process: peak bytes})."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peaks: dict[str, int] = {}
    while process.poll() is None:
        try:
            for pid in children(process.pid):
                line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                name = "verify" if b"hub_export.golden" in line else "convert"
                peaks[name] = max(peaks.get(name, 0), peak_bytes(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit {process.returncode}")
    return time.perf_counter() - start, peaks


def measure(
    architecture: str,
    classes: int,
    directory: pathlib.Path,
    to: Sequence[str] = ("savedmodel",),
) -> Iterator[dict]:
    """Converts random weights; see the module's docstring.

    Yields:
      {"to": format, "bytes": the larger of what is read and written,
      "seconds": …, "peaks": {process: bytes}}
    """
    from hub_export import random_weights

    directory.mkdir(parents=True, exist_ok=True)
    source = directory / f"RANDOM-{architecture}.npz"
    random_weights.write_checkpoint(architecture, source, classes)
    try:
        for number, name in enumerate(to):
            suffix = ".keras" if name.startswith("keras") else f".{name}"
            target = directory / f"RANDOM-{architecture}-{number}{suffix}"
            read = size(source)
            try:
                seconds, peaks = watch(
                    [
                        *(sys.executable, "-c"),
                        "from hub_export.commands import main; main()",
                        *("convert", str(source), str(target), "--to", name),
                    ]
                )
            finally:
                remove(source)
                source = target
            yield {
                "to": name,
                "bytes": max(read, size(target)),
                "seconds": seconds,
                "peaks": peaks,
            }
    finally:
        remove(source)


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*"))
    return path.stat().st_size


def remove(path: pathlib.Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "architecture",
        nargs="?",
        default="R152x4",
        choices=list(variants.ARCHITECTURES),
    )
    parser.add_argument("--classes", type=int, default=21843)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--to", nargs="+", default=["savedmodel"])
    args = parser.parse_args()
    for result in measure(
        args.architecture, args.classes, args.directory, args.to
    ):
        print(
            f"{result['to']}: {result['bytes'] / 1e9:.2f} GB, "
            f"{result['seconds']:.0f} s"
        )
        for name, peak in result["peaks"].items():
            ratio = peak / result["bytes"]
            print(f"  {name}: peak {peak / 1e9:.2f} GB, {ratio:.2f} x")


if __name__ == "__main__":
    main()
