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
        "Versions that are there already are kept if the names and the sizes "
        "of their files are right, else copied again; `hub-export verify OUT` "
        "compares all hashes.",
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
        "--url or else any; the address must be one without a path",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    from hub_export import repository, site

    text = None
    if args.nginx:
        url = args.url
        if url is None:
            url = repository.index(args.repository).url
        else:
            url = repository.checked_url(url)
        if url and urllib.parse.urlsplit(url).path:
            print(
                "hub-export site: error: --nginx writes a server for the root "
                f"of a host. Received: the address {url}, which has a path. "
                "Give --url without one, or leave --nginx out and write a "
                "location of that path into a configuration of your own.",
                file=sys.stderr,
            )
            return 2
        text = _configuration(args)
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
    if text is not None:
        with repository.writing(
            args.nginx,
            "A configuration of nginx is a file in a directory that can be "
            "written",
            f"{args.out} is written; correct --nginx, and run it again",
        ):
            repository.replace_file(args.nginx, text.encode())
    repaired = f", {len(result.repaired)} repaired" if result.repaired else ""
    print(
        f"{args.out}: {len(result.copied)} versions copied, "
        f"{len(result.kept)} kept{repaired}"
    )
    return 0


def _configuration(args) -> str:
    from hub_export import nginx

    host = (args.url and urllib.parse.urlsplit(args.url).hostname) or "_"
    # An address of IPv6 is no name to nginx.
    return nginx.nginx_configuration(
        args.out, server_name="_" if ":" in host else host
    )
