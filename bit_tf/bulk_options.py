"""Beam's options: none is dropped, and nothing is downloaded for them."""

import os
from collections.abc import Sequence
from typing import NoReturn

from bit_tf import errors
from bit_tf.beam_modules import pipeline_options

__all__ = ["cores", "options", "threads_of"]

_DIRECT = "DirectRunner"
# Runners with a job server, which has options that only it knows.
_OPEN = ("PortableRunner", "FlinkRunner", "SparkRunner", "PrismRunner")


class _Parser(pipeline_options._BeamArgumentParser):
    """Beam's parser, which raises in the place of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise errors.BitTfError(
            "An option of Beam has a value that it takes. Received: "
            f"{message}. See the options of Beam's runners."
        )


def options(beam_options: Sequence[str]) -> pipeline_options.PipelineOptions:
    """The options of a pipeline.

    Beam itself warns of an option that it does not know, and goes on without.

    Args:
      beam_options: as on a command line; without a runner it is DirectRunner.

    Raises:
      UnknownNameError: there is no such option or runner.
      BitTfError: an option's value is wrong.
    """
    if isinstance(beam_options, str):
        raise TypeError(
            "beam_options is a list, such as ['--runner=DirectRunner']. "
            f"Received: {beam_options!r}."
        )
    texts = list(beam_options)
    parser = _Parser(allow_abbrev=False, add_help=False)
    for kind in pipeline_options.PipelineOptions.__subclasses__():
        kind._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(texts)
    runner = _runner(known.runner)
    names = {
        option: option
        for action in parser._actions
        for option in action.option_strings
    }
    only_here = runner not in _OPEN or known.job_endpoint == "embed"
    for text in unknown:
        if not text.startswith("--"):
            raise errors.BitTfError(
                "An option of Beam is written --name=value. Received: "
                f"{text!r}. Write it with its name and '='."
            )
        if only_here:
            errors.lookup(names, text.partition("=")[0], "Options of Beam")
    chosen = pipeline_options.PipelineOptions(texts)
    chosen.view_as(pipeline_options.StandardOptions).runner = runner
    if known.job_endpoint == "embed" and known.environment_type is None:
        # Beam's default is a container, which it would download.
        portable = chosen.view_as(pipeline_options.PortableOptions)
        portable.environment_type = "LOOPBACK"
    if runner == _DIRECT:
        # Keeps it from trying Prism first, a program that it downloads: there
        # are no triggers in these pipelines, and Prism does not take the
        # option.
        types = chosen.view_as(pipeline_options.TypeOptions)
        types.allow_unsafe_triggers = True
        if known.default_sdk_harness_log_level is None:
            # Worker processes write what they do to stderr.
            workers = chosen.view_as(pipeline_options.WorkerOptions)
            workers.default_sdk_harness_log_level = "WARNING"
    return chosen


def _runner(name: str | None) -> str:
    """A runner's name as Beam spells it, or a class's path as it is."""
    if name is None:
        return _DIRECT
    if "." in name:
        return name
    known = pipeline_options.StandardOptions.KNOWN_RUNNER_NAMES
    by_case = {text.lower(): text for text in known}
    for text in (name.lower(), f"{name.lower()}runner"):
        if text in by_case:
            return by_case[text]
    return errors.lookup(
        {text: text for text in sorted(by_case.values())}, name, "Runners"
    )


def threads_of(chosen: pipeline_options.PipelineOptions) -> int | None:
    """A process' share of the cores, where several are on this machine.

    Returns:
      1 or more; None where the runner, not this machine, has the processes.
    """
    direct = chosen.view_as(pipeline_options.DirectOptions)
    if direct.direct_running_mode != "multi_processing":
        return None
    return max(1, cores() // (direct.direct_num_workers or cores()))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
