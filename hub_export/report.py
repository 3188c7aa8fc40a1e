"""What checks of a model or repository found, for people and programs."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from hub_export import entry
from hub_export.description import clean
from hub_export.graph import ABSENT, FAILED, PASSED, Check

__all__ = ["Findings", "Report"]

_MARKS = {PASSED: "✓", FAILED: "✗", ABSENT: "–"}
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found at one target.

    Attributes:
      target: a path, or an address without password and query.
      checks: in the order in which they are listed.
      graph: what a fresh process found in the SavedModel, or None if it was
        not loaded, or is no reusable model of pictures.
    """

    target: str
    checks: tuple[Check, ...]
    graph: entry.Graph | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != FAILED for check in self.checks)

    def table(self) -> str:
        """A line for the target and one for each check, safe to print."""
        width = max(len(check.name) for check in self.checks)
        lines = [_printable(self.target)]
        lines += [
            f"  {_MARKS[check.status]} {check.name:{width}}  "
            f"{_printable(check.detail)}"
            for check in self.checks
        ]
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        return {
            "target": self.target,
            "ok": self.ok,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "graph": self.graph and dataclasses.asdict(self.graph),
        }


class Findings:
    """A report in the making: what was found, by the check's name.

    A check with a problem failed, another one with a detail passed, and the
    rest is absent.

    Attributes:
      graph: as in `Report`.
    """

    def __init__(self, target: str, names: Iterable[str]):
        self.graph: entry.Graph | None = None
        self._target = target
        self._names = tuple(names)
        self._problems = collections.defaultdict[str, list[str]](list)
        self._details = collections.defaultdict[str, list[str]](list)
        self._absent: dict[str, str] = {}

    def fail(self, name: str, *problems: str) -> None:
        """Says what is wrong."""
        self._problems[name] += problems

    def note(self, name: str, detail: str) -> None:
        """Says what was found."""
        self._details[name].append(detail)

    def absent(self, why: str, *names: str) -> None:
        """Says why nothing was checked, unless something was."""
        for name in names:
            self._absent.setdefault(name, why)

    def fail_rest(self, why: str) -> None:
        """Fails what cannot be checked any more."""
        for name in self._names:
            if not {name} & {*self._problems, *self._details, *self._absent}:
                self.fail(name, why)

    def failed(self, name: str) -> bool:
        """Whether something is wrong."""
        return bool(self._problems[name])

    def report(self) -> Report:
        """What was found up to now."""
        return Report(
            self._target,
            tuple(self._check(name) for name in self._names),
            self.graph,
        )

    def _check(self, name: str) -> Check:
        problems, details = self._problems[name], self._details[name]
        if problems:
            return Check(name, FAILED, _listed(problems))
        if details:
            return Check(name, PASSED, "; ".join(details))
        return Check(name, ABSENT, self._absent.get(name, "nothing to check"))


def _listed(problems: list[str]) -> str:
    shown = "; ".join(problems[:_MOST_NAMED])
    more = len(problems) - _MOST_NAMED
    return f"{shown}; and {more} more" if more > 0 else shown


def _printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return clean(" ".join(text.split()))
