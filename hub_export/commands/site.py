"""`hub-export site`: a repository → a directory for static hosts."""

import pathlib
import sys
import urllib.parse

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "site",
        help="copy a repository for static hosts",
        description="Copies a repository of models into a directory of real "
        "files, for nginx, a bucket or any other host of plain files. "
        "Versions that are there already are kept.",
    )
    parser.add_argument("repository", metavar="DIR", help="the repository")
    parser.add_argument(
        "out", metavar="OUT", help="a new or empty directory, or earlier site"
    )
    parser.add_argument(
        "--url",
        help="the public address of OUT's root (default: the repository's)",
    )
    parser.add_argument(
        "--nginx",
        metavar="FILE",
        type=pathlib.Path,
        help="write a configuration of nginx that serves OUT, for the host of "
        "--url or else any",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    from hub_export import repository, site

    result = site.site(
        args.repository,
        args.out,
        url=args.url,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if result.others:
        print(
            f"Note: {args.out} has versions that {args.repository} has not; "
            "they were left alone: " + ", ".join(map(str, result.others)),
            file=sys.stderr,
        )
    if args.nginx:
        from hub_export import nginx

        host = args.url and urllib.parse.urlsplit(args.url).hostname
        text = nginx.nginx_configuration(args.out, server_name=host or "_")
        with repository.writing(args.nginx.parent):
            repository.replace_file(args.nginx, text.encode())
    print(
        f"{args.out}: {len(result.copied)} versions copied, "
        f"{len(result.kept)} kept"
    )
    return 0
