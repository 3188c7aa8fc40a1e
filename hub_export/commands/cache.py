"""`hub-export cache`: the cache of tensorflow_hub."""

import argparse
import json
import os
import re
import sys

from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "cache",
        help="list, verify, repair, fill or empty the cache of tensorflow_hub",
        description="Works on the cache that tensorflow_hub's hub.load and "
        "hub.KerasLayer read. A half-cleaned entry there stays broken for "
        "ever: verify finds it, and repair replaces it.",
    )
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--cache",
        metavar="DIR",
        help="the cache (default: $TFHUB_CACHE_DIR, else tfhub_modules in the "
        "system's folder of temporary files)",
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "handles",
        metavar="HANDLE",
        nargs="*",
        help="a handle, in any of its spellings, or the name of an entry "
        "(default: all)",
    )

    def add(name, text, *parents):
        return actions.add_parser(
            name, help=text, description=f"{text}.", parents=[*parents, common]
        )

    add("ls", "list the models in the cache", chosen)
    add(
        "verify",
        "read every file, and compare it with its record, with the entry in "
        "a mirror on this disk, or with the checksums of the variables; "
        "exit 1 if anything is broken",
        chosen,
    )
    repair = add(
        "repair",
        "fetch broken models again, and remove stale locks and left-overs; "
        "exit 1 if something stays broken",
        chosen,
    )
    repair.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be done",
    )
    repair.add_argument(
        "--offline",
        action="store_true",
        default=None,
        help="take models from this disk only",
    )
    seed = add(
        "seed",
        "put models into the cache under every spelling of their handles, so "
        "that unchanged code runs offline",
    )
    seed.add_argument(
        "pairs",
        metavar="HANDLE=SOURCE",
        nargs="+",
        help="SOURCE is the directory of a SavedModel, an archive, the folder "
        "of a version in a repository, or any handle",
    )
    seed.add_argument(
        "--overwrite",
        action="store_true",
        help="replace whole models of other content",
    )
    rm = add("rm", "remove models from the cache", chosen)
    rm.add_argument("--all", action="store_true", help="remove all of them")


def run(args) -> int:
    from bit_tf import hub_cache

    root = hub_cache.directory(args.cache)
    return _ACTIONS[args.action](args, root)


def _ls(args, root) -> int:
    from hub_export import cache

    rows = cache.listed(root, args.handles or None)
    used = cache.used(root, rows)
    if args.json:
        _print_rows(root, rows, used)
        return 0
    table = [
        (
            row.state,
            _megabytes(row.size),
            str(row.files),
            _age(row.age),
            f"{row.handle}{_others(count)}",
        )
        for row, count in _grouped(rows)
    ]
    _print_table(("state", "size", "files", "age", "handle"), table)
    partial = sum(row.partial for row in rows)
    more = f", {_megabytes(partial)} of unfinished work" if partial else ""
    print(
        f"{root}: {_models(rows)}, {_megabytes(used)} on the disk (shared "
        f"files count once){more}"
    )
    return 0


def _verify(args, root) -> int:
    program.quiet_tensorflow()
    from hub_export import cache

    rows = cache.listed(root, args.handles or None, thorough=True)
    wrong = [row for row in rows if row.problems]
    if args.json:
        _print_rows(root, rows, cache.used(root, rows))
        return int(bool(wrong))
    for row, count in _grouped(rows):
        mark = "✗" if row.problems else "✓"
        print(f"{mark} {row.state:11} {row.handle}{_others(count)}")
        for problem in row.problems:
            print(f"    {problem}")
        if row.compared == "checksums":
            print("    not compared: no record of the graph and the assets")
    print(f"{root}: {_models(rows)}, {len(wrong)} with problems")
    if wrong:
        print("Repair them with: hub-export cache repair")
    return int(bool(wrong))


def _repair(args, root) -> int:
    program.quiet_tensorflow()
    from hub_export import cache

    steps = cache.repaired(
        root,
        args.handles or None,
        dry_run=args.dry_run,
        offline=args.offline,
    )
    done = all(step.done for step in steps)
    if args.json:
        _print_steps(root, steps, dry_run=args.dry_run)
        return int(not done)
    would = "would be " if args.dry_run else ""
    for step in steps:
        print(f"{would if step.done else ''}{step.action}: {step.handle}")
        print("    " + step.detail.replace("\n", "\n    "))
    if not steps:
        print(f"{root}: nothing to repair")
    return int(not done)


def _seed(args, root) -> int:
    pairs = []
    for text in args.pairs:
        pair = _pair(text)
        if pair is None:
            return _misused(
                "seed",
                "write HANDLE=SOURCE, where SOURCE is a directory, an archive "
                f"or a handle, not {text!r}; is there such a file?",
            )
        pairs.append(pair)
    program.quiet_tensorflow()
    from hub_export import cache

    steps = []
    for handle, source in pairs:
        steps += cache.seeded(
            handle, source, root=root, overwrite=args.overwrite
        )
    done = all(step.done for step in steps)
    if args.json:
        _print_steps(root, steps)
        return int(not done)
    for step, count in _alike(steps):
        print(f"{step.action:9} {step.handle}{_others(count)}")
        if not step.done:
            print(f"    {step.detail}")
    print(f"{root}: set TFHUB_CACHE_DIR to it where the models are used.")
    return int(not done)


def _rm(args, root) -> int:
    if bool(args.handles) == args.all:
        return _misused("rm", "name the handles to remove, or pass --all")
    from hub_export import cache

    steps, freed = cache.removed(root, args.handles or None)
    done = all(step.done for step in steps)
    if args.json:
        _print_steps(root, steps, freed=freed)
        return int(not done)
    for step, count in _alike(steps):
        detail = "" if step.done else f": {step.detail}"
        print(f"{step.action} {step.handle}{_others(count)}{detail}")
    print(f"{root}: {freed} bytes freed")
    return int(not done)


_ACTIONS = {
    "ls": _ls,
    "verify": _verify,
    "repair": _repair,
    "seed": _seed,
    "rm": _rm,
}


def _misused(action: str, text: str) -> int:
    print(f"hub-export cache {action}: error: {text}", file=sys.stderr)
    return 2


def _pair(text: str) -> tuple[str, str] | None:
    """(handle, source) of "HANDLE=SOURCE"; both may have a "=" of their own."""
    from bit_tf import errors, hub

    for match in re.finditer("=", text):
        handle, source = text[: match.start()], text[match.end() :]
        if not handle:
            continue
        if os.path.exists(source) or re.match("[a-z]+://", source):
            return handle, source
        try:
            hub.as_address(source)
        except errors.HandleError:
            continue
        return handle, source
    return None


def _grouped(rows):
    """(row, number of other spellings of the same that look the same)."""
    groups: dict[tuple, list] = {}
    for row in rows:
        same = (
            row.model,
            row.state,
            row.size,
            row.files,
            row.problems,
            row.compared,
        )
        groups.setdefault(same, []).append(row)
    for group in groups.values():
        named = [row for row in group if row.handle == row.model]
        yield (named or group)[0], len(group) - 1


def _alike(steps):
    """(step, number of other spellings for which the same was done)."""
    from bit_tf import handles

    groups: dict[tuple, list] = {}
    for step in steps:
        model = handles.known(step.handle) or step.handle
        same = (model, step.action, step.done, not step.done and step.detail)
        groups.setdefault(same, []).append(step)
    for (model, *_), group in groups.items():
        usual = f"{handles.TFHUB}{model}"
        named = [step for step in group if step.handle == usual]
        yield (named or group)[0], len(group) - 1


def _others(count: int) -> str:
    plural = "" if count == 1 else "s"
    return f" and {count} other spelling{plural}" if count else ""


def _print_rows(root, rows, used) -> None:
    print(
        json.dumps(
            {
                "cache": str(root),
                "bytes": used,
                "entries": [row.to_dict() for row in rows],
            }
        )
    )


def _print_steps(root, steps, **more) -> None:
    found = [step.to_dict() for step in steps]
    print(json.dumps({"cache": str(root), **more, "steps": found}))


def _print_table(head, rows) -> None:
    """Columns as wide as they need; the last one is not padded."""
    widths = [
        max(len(row[column]) for row in [head, *rows])
        for column in range(len(head) - 1)
    ]
    for row in [head, *rows]:
        *cells, last = row
        padded = map(str.ljust, cells, widths)
        print("  ".join([*padded, last]))


def _models(rows) -> str:
    there = [row.model for row in rows if row.state in ("whole", "broken")]
    count = len(set(there))
    plural = "" if count == 1 else "s"
    return f"{count} model{plural} in {len(there)} entries"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
