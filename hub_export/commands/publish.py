"""`hub-export publish`: weights → a version in a repository."""

import dataclasses
import json
import shlex
import sys

from bit_tf import errors
from bit_tf.commands import program
from hub_export.commands import options

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "publish",
        help="checkpoint or SavedModel to a repository of models",
        description="Publishes weights under a handle such as "
        "google/bit/m-r50x1 in a directory that any web server can host. The "
        "SavedModel is made in a fresh process, packed, loaded back and "
        "checked before it appears, whole, as a version that never changes.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a checkpoint (a path, a published name such as BiT-M-R50x1 or "
        "google/bit-50, hf://owner/name, or a URL), a SavedModel's directory "
        "or .tar.gz, or a version's folder in a repository",
    )
    parser.add_argument(
        "--repository",
        required=True,
        metavar="DIR",
        help="the repository's root; it is made if there is none",
    )
    parser.add_argument(
        "--handle", help="publisher/name, or publisher/name/version"
    )
    parser.add_argument(
        "--version",
        type=program.positive,
        help="of the model (default: the one after the newest)",
    )
    parser.add_argument(
        "--all",
        choices=["M", "S"],
        help="instead of SOURCE and --handle: the feature vectors and "
        "classifiers of Google's BiT-M or BiT-S, under Google's names",
    )
    parser.add_argument(
        "--architecture",
        nargs="+",
        help="with --all: such as R50x1 (default: all that Google published)",
    )
    parser.add_argument(
        "--head",
        choices=["keep", "none"],
        help="none publishes features (default: keep if the handle ends in "
        "_classification, else none)",
    )
    options.add(parser)
    parser.add_argument(
        "--description",
        help="one or two sentences (default: made from the facts)",
    )
    parser.add_argument(
        "--license",
        help="an SPDX identifier, such as mit (default: apache-2.0 for "
        "Google's published weights, else none is stated)",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        help="what it was trained on, may be repeated (default: what is known "
        "of published weights)",
    )
    parser.add_argument(
        "--url",
        help="the public address of the repository's root (default: the one "
        "that it was given before)",
    )
    parser.add_argument(
        "--title", help="of the repository's front page (default: likewise)"
    )
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="publish nothing: make index.json and the pages outside of the "
        "versions anew, as for another --url or --title",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="do everything in a temporary directory, and list what would be "
        "written",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    program.add_relocate(parser)
    parser.set_defaults(run=run)


def run(args) -> int:
    problem = _problem(args)
    if problem:
        print(f"hub-export publish: error: {problem}", file=sys.stderr)
        return 2
    if args.refresh:
        return _refresh(args)
    # The check reads the graph here before it is loaded in a fresh process.
    program.quiet_tensorflow()
    from hub_export import publishing

    asked = {
        "class_labels": options.class_labels(args.labels),
        "probabilities": args.probabilities,
        "l2": args.l2,
        "numerics": options.numerics(args.numerics),
        "license": args.license,
        "datasets": args.dataset,
        "url": args.url,
        "title": args.title,
        "say": _say,
    }
    if args.all:
        found = publishing.publish_all(
            args.all,
            args.repository,
            architectures=args.architecture,
            **asked,
        )
    else:
        asked |= {
            "version": args.version,
            "head": args.head,
            "description": args.description,
        }
        target = args.source, args.repository, args.handle
        if args.dry_run:
            return _show(publishing.plan(*target, **asked), args.json)
        found = [publishing.publish(*target, **asked)]
    if args.json:
        rows = [entry.to_dict() for entry in found]
        print(json.dumps(rows if args.all else rows[0]))
        return 0
    for entry in found:
        _report(entry)
    print(f"Serve it:  hub-export serve {shlex.quote(args.repository)}")
    if found:
        from hub_export import repository

        url = repository.index(args.repository).url
        base = url or "http://127.0.0.1:8080"
        print(f'Load it:   hub.load("{base}/{found[-1].handle}")')
    return 0


def _refresh(args) -> int:
    from hub_export import repository, tree

    if not (
        tree.is_repository(args.repository)
        or repository.is_unfinished(args.repository)
    ):
        raise errors.ExportError(
            "What is refreshed is a repository that something was published "
            f"in. Received: {args.repository!r}, which has no index.json."
        )
    found = repository.refresh(args.repository, url=args.url, title=args.title)
    if args.json:
        print(json.dumps([entry.to_dict() for entry in found]))
    else:
        print(f"{args.repository}: index and pages of {len(found)} versions")
    return 0


def _problem(args) -> str | None:
    """What is wrong with the options, taken together."""
    if args.refresh:
        others = args.all or args.source or args.handle or args.dry_run
        return "--refresh is alone, with --url and --title" if others else None
    if not args.all:
        if args.architecture:
            return "--architecture is for --all"
        if not args.source or not args.handle:
            return "SOURCE and --handle are needed, or --all"
        return None
    for name in ("source", "handle", "version", "head", "description"):
        if getattr(args, name) is not None:
            option = "SOURCE" if name == "source" else f"--{name}"
            return f"{option} is not for --all"
    return "--dry-run is for one model, not for --all" if args.dry_run else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(plan, as_json: bool) -> int:
    """Prints what a publication would write."""
    if as_json:
        files = [dataclasses.asdict(file) for file in plan.files]
        print(json.dumps({"entry": plan.entry.to_dict(), "files": files}))
        return 0
    widths = [
        max(len(str(getattr(file, name))) for file in plan.files)
        for name in ("path", "size")
    ]
    for file in plan.files:
        print(
            f"{file.path:{widths[0]}}  {file.size:{widths[1]}}  {file.sha256}"
        )
    print(
        f"{plan.entry.handle} would be published with these {len(plan.files)} "
        "files; nothing was written."
    )
    return 0


def _report(entry) -> None:
    """Prints what a user may want to note of a version."""
    print(f"Published  {entry.handle}")
    print(f"Archive:   {entry.archive.path}, {entry.archive.size} bytes")
    print(f"SHA-256:   {entry.archive.sha256}")
