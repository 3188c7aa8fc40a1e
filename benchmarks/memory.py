"""Time and peak memory of converting an architecture, at full size.

    python -m benchmarks.memory R152x4 --classes 21843 --directory /tmp/big

Writes random weights in the published layout, runs `hub-export convert` on
them, and watches every process of it, the verifier included, through Linux'
/proc. Prints each one's peak and its ratio to the weights' bytes.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import time

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


def measure(architecture: str, classes: int, directory: pathlib.Path) -> dict:
    """Converts random weights; see the module's docstring.

    Returns:
      {"weights": bytes, "seconds": …, "peaks": {process: bytes}}
    """
    from hub_export import demo

    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / f"RANDOM-{architecture}.npz"
    model = directory / f"RANDOM-{architecture}"
    try:
        demo.write_random_checkpoint(architecture, checkpoint, classes)
        seconds, peaks = watch(
            [
                *(sys.executable, "-c"),
                "from hub_export.commands import main; main()",
                *("convert", str(checkpoint), str(model), "--overwrite"),
            ]
        )
    finally:
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(model, ignore_errors=True)
    row = variants.architecture(architecture)
    weights = 4 * row.count_params(classes)
    return {"weights": weights, "seconds": seconds, "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("architecture", nargs="?", default="R152x4")
    parser.add_argument("--classes", type=int, default=21843)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    args = parser.parse_args()
    result = measure(args.architecture, args.classes, args.directory)
    weights = result["weights"]
    print(f"weights: {weights / 1e9:.2f} GB, {result['seconds']:.0f} s")
    for name, peak in result["peaks"].items():
        print(f"{name}: peak {peak / 1e9:.2f} GB, {peak / weights:.2f} x")


if __name__ == "__main__":
    main()
