"""Reads many URLs at once: few of one host, again where a failure may pass."""

import collections
import concurrent.futures
import dataclasses
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from bit_tf import download
from bit_tf.download import Abort
from bit_tf.errors import ImageFetchError

__all__ = ["LONGEST_TIMEOUT", "Fetcher", "Read", "Workers"]

# Seconds.
LONGEST_TIMEOUT = 86_400

# Statuses of failures that may pass by themselves.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# Seconds: how long a thread without work waits for some, and how long closing
# waits for a thread that nothing can interrupt.
_IDLE = 5.0
_FAREWELL = 2.0


@dataclasses.dataclass(eq=False)
class Read:
    """One read that is asked for.

    Attributes:
      run: gives the bytes; ends early when the Abort is set.
      lane: reads of one lane are begun in their order.
      limit: how many of its lane run at once.
      ready: whether it may begin; asked again after Workers.look.
      again: what a failure of attempt 0, 1, … means: the seconds until the
        next one, or None if it is final.
      future: the bytes, or the last failure.
    """

    run: Callable[[Abort], bytes]
    lane: str
    limit: int
    ready: Callable[[], bool] = lambda: True
    again: Callable[[Exception, int], float | None] = lambda error, attempt: (
        None
    )
    future: concurrent.futures.Future[bytes] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )
    attempt: int = 0
    due: float = 0.0
    abort: Abort = dataclasses.field(default_factory=Abort)


class _Lane:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.reads: collections.deque[Read] = collections.deque()
        # Until when the other side asked to be left alone.
        self.rest = 0.0


class Workers:
    """Threads that run reads, none of which waits while it could do another.

    A read that is to be tried again later, or whose lane is full, takes no
    thread meanwhile. Threads start when they are needed, and end when they are
    not.
    """

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._changed = threading.Condition()
        self._lanes: dict[str, _Lane] = {}
        self._threads: set[threading.Thread] = set()
        self._running: set[Read] = set()
        # Threads that wait, and how many of them were told to look again and
        # have not done so yet.
        self._idle = self._woken = 0
        self._closed = False

    def start(self, read: Read) -> concurrent.futures.Future[bytes]:
        """Has a read done; returns its future."""
        with self._changed:
            if self._closed:
                raise RuntimeError("These workers are closed.")
            lane = self._lanes.setdefault(read.lane, _Lane(read.limit))
            lane.reads.append(read)
            if not self._wake() and len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, daemon=True)
                self._threads.add(thread)
                thread.start()
        return read.future

    def look(self) -> None:
        """Says that reads may be ready which were not."""
        with self._changed:
            self._woken = self._idle
            self._changed.notify_all()

    def _wake(self) -> bool:
        """Has one more thread look for work; False if none waits."""
        if self._idle <= self._woken:
            return False
        self._woken += 1
        self._changed.notify()
        return True

    def cancel(self, reads: Iterable[Read]) -> None:
        """Drops reads, and ends those under way; returns at once."""
        reads = list(reads)
        with self._changed:
            for read in reads:
                lane = self._lanes.get(read.lane)
                if lane is not None and read in lane.reads:
                    lane.reads.remove(read)
                    self._tidy(read.lane)
                read.future.cancel()
        for read in reads:
            read.abort.set()

    def close(self) -> None:
        """Drops all reads, and waits until the threads have ended.

        Only the system's look-up of a host's name cannot be interrupted; its
        thread ends with it.
        """
        with self._changed:
            self._closed = True
            queued = [r for lane in self._lanes.values() for r in lane.reads]
            reads = [*queued, *self._running]
            threads = list(self._threads)
            self._changed.notify_all()
        self.cancel(reads)
        until = time.monotonic() + _FAREWELL
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (read := self._take()) is not None:
            self._finish(read, *_outcome(read))

    def _take(self) -> Read | None:
        """The next read to run; None ends the thread."""
        with self._changed:
            while not self._closed:
                read, wait = self._next()
                if read is not None:
                    return read
                self._idle += 1
                noted = self._changed.wait(_IDLE if wait is None else wait)
                self._idle -= 1
                self._woken = max(0, self._woken - 1)
                for name in list(self._lanes):
                    self._tidy(name)
                if not noted and not self._lanes:
                    break
            self._threads.discard(threading.current_thread())
        return None

    def _next(self) -> tuple[Read | None, float | None]:
        """A read that can run now, or the seconds until one can."""
        now = time.monotonic()
        soonest = None
        for name, lane in self._lanes.items():
            for read in lane.reads if lane.active < lane.limit else ():
                wait = max(read.due, lane.rest) - now
                if wait > 0:
                    soonest = min(wait, soonest or wait)
                elif read.ready():
                    lane.reads.remove(read)
                    lane.active += 1
                    self._running.add(read)
                    # The other lanes come first then.
                    self._lanes[name] = self._lanes.pop(name)
                    self._wake()
                    return read, None
        return None, soonest

    def _finish(
        self, read: Read, data: bytes | None, error: BaseException | None
    ) -> None:
        with self._changed:
            lane = self._lanes[read.lane]
            lane.active -= 1
            self._running.discard(read)
            wait = None
            if isinstance(error, Exception) and not self._stopped(read):
                wait = read.again(error, read.attempt)
            if wait is not None:
                read.attempt += 1
                read.due = time.monotonic() + wait
                if getattr(error, "retry_after", None) is not None:
                    lane.rest = max(lane.rest, read.due)
                lane.reads.appendleft(read)
                self._wake()
                return
            self._tidy(read.lane)
        if not read.future.set_running_or_notify_cancel():
            return
        if error is None:
            read.future.set_result(data or b"")
        else:
            read.future.set_exception(error)

    def _stopped(self, read: Read) -> bool:
        return self._closed or read.abort.is_set() or read.future.cancelled()

    def _tidy(self, name: str) -> None:
        lane = self._lanes[name]
        rests = lane.rest > time.monotonic()
        if not lane.reads and not lane.active and not rests:
            del self._lanes[name]


def _outcome(read: Read) -> tuple[bytes | None, BaseException | None]:
    try:
        return read.run(read.abort), None
    except BaseException as error:  # noqa: BLE001
        # For the one who waits, whatever it is.
        return None, error


class Fetcher:
    """Reads URLs, several at once, and again where a failure may pass.

    A failed connection, a time-out, and the statuses 408, 425, 429, 500, 502,
    503 and 504 are tried again: after half a second, one, two, …, each
    shortened at random by up to a half, or when the server's Retry-After says,
    which then holds for all of that host. Nothing else is tried again.
    """

    def __init__(
        self,
        *,
        connections: int = 32,
        per_host: int = 8,
        retries: int = 3,
        timeout: float = download.TIMEOUT,
        max_bytes: int = download.MAX_BYTES,
        public_only: bool = False,
        backoff: float = 0.5,
        longest_wait: float = 60.0,
        seed: int = 0,
    ) -> None:
        """Starts nothing yet.

        Args:
          connections: URLs in flight at once.
          per_host: of them, of one host (and port).
          retries: how often a URL is tried again.
          timeout: seconds for each try, as in download.read_url; at most a
            day.
          max_bytes: the largest body, as there.
          public_only: refuses hosts without a public address, as there.
          backoff: seconds before the first try again; doubled each time.
          longest_wait: the most seconds before a try, whoever asks for more.
          seed: of the random part of the waits.

        Raises:
          ValueError: a number that is too small, or not of its type.
        """
        for name, value, least in (
            ("connections", connections, 1),
            ("per_host", per_host, 1),
            ("retries", retries, 0),
            ("max_bytes", max_bytes, 1),
        ):
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{name} is an integer, at least {least}. Received: "
                    f"{name}={value!r}."
                )
        if isinstance(timeout, str) or not 0 < timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                "timeout is above 0 seconds, and at most "
                f"{LONGEST_TIMEOUT}. Received: timeout={timeout!r}."
            )
        self._per_host = per_host
        self._retries = retries
        self._limits: dict[str, Any] = {
            "timeout": timeout,
            "max_bytes": max_bytes,
            "public_only": public_only,
        }
        self._backoff = backoff
        self._longest_wait = longest_wait
        self._seed = seed
        self.workers = Workers(connections)

    def fetch(self, url: str) -> bytes:
        """The body behind a URL.

        Raises:
          ImageError: as download.read_url does, after the last try.
        """
        read = self.read(url)
        try:
            return self.workers.start(read).result()
        finally:
            self.workers.cancel([read])

    def read(self, url: str, ready: Callable[[], bool] = lambda: True) -> Read:
        """What `workers.start` takes, to read a URL with others."""

        def run(abort: Abort) -> bytes:
            return download.read_url(url, abort=abort, **self._limits)

        def again(error: Exception, attempt: int) -> float | None:
            return self.wait(url, error, attempt)

        return Read(run, _host(url), self._per_host, ready, again)

    def wait(self, url: str, error: Exception, attempt: int) -> float | None:
        """Seconds until a URL is tried again, or None if it is not.

        Args:
          url: what was read.
          error: how that failed.
          attempt: 0 for the first try.
        """
        if not isinstance(error, ImageFetchError) or attempt >= self._retries:
            return None
        if not error.transient and error.status not in _TRANSIENT:
            return None
        # Of a generator of its own, so that the order of reads does not count.
        part = random.Random(f"{self._seed} {attempt} {url}").random()  # noqa: S311
        wait = self._backoff * 2 ** min(attempt, 60) * (1 - part / 2)
        return min(max(wait, error.retry_after or 0.0), self._longest_wait)

    def close(self) -> None:
        """Ends what is under way, and the threads."""
        self.workers.close()


def _host(url: str) -> str:
    """A URL's host and port, without user and password."""
    try:
        return urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
