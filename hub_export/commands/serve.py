"""`hub-export serve`: a repository on the web."""

import argparse

from bit_tf.commands import program

__all__ = ["register"]


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a repository of models",
        description="Serves a repository, or what `hub-export site` made of "
        "one, to hub.load, hub.KerasLayer and browsers: archives, pages and "
        "every file of it, read-only. What is published meanwhile is served "
        "at once. Stops at SIGTERM and Ctrl-C, after running downloads.",
    )
    parser.add_argument("root", metavar="DIR", help="the repository")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at; 0.0.0.0 and :: are all of this "
        "machine's (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8080,
        help="0 for any that is free; the address is printed (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--bucket",
        metavar="gs://NAME/PREFIX",
        help="where a copy of DIR lies for TFHUB_MODEL_LOAD_FORMAT="
        "UNCOMPRESSED (default: there is none)",
    )
    parser.add_argument(
        "--root-path",
        metavar="/PREFIX",
        default="",
        help="the path under which a proxy publishes this server",
    )
    parser.add_argument(
        "--no-access-log",
        dest="access_log",
        action="store_false",
        help="do not log requests",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="that running downloads have when the server is stopped "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--limit-concurrency",
        type=program.positive,
        default=512,
        metavar="N",
        help="requests at the same time; others get status 503 (default: "
        "%(default)s)",
    )
    parser.set_defaults(run=run)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, not {text}")
    return number


def _seconds(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"must be from 0 to 86400, not {text}")
    return number


def run(args) -> int:
    from hub_export import serving

    serving.serve(
        args.root,
        host=args.host,
        port=args.port,
        bucket=args.bucket,
        root_path=args.root_path,
        access_log=args.access_log,
        grace=args.grace,
        limit=args.limit_concurrency,
        ready=lambda address: print(
            f"Serving {args.root} at {address}", flush=True
        ),
    )
    return 0
