"""Many URLs at once, against servers that misbehave on real ports."""

import collections
import contextlib
import email.utils
import signal
import socket
import threading
import time

import pytest
from file_server import FileServer, Reply, running

from bit_tf import fetching
from bit_tf.errors import ImageError, ImageFetchError, ImageTooLargeError
from bit_tf.fetching import Fetcher

BODY = bytes(range(256)) * 40


class Everything(dict):
    """Has a body for every path."""

    def get(self, path):
        return BODY


class Server(FileServer):
    """Knows answers by path, and how many requests are answered at once."""

    def __init__(self):
        super().__init__()
        self.by_path = collections.defaultdict(collections.deque)
        self.pause = 0.0
        self.now = self.paused = self.most = 0
        self.counting = threading.Lock()
        self.bodies = Everything()

    def reply(self, method, path):
        replies = self.by_path[path]
        if len(replies) > 1:
            return replies.popleft()
        return replies[0] if replies else Reply()

    def answer(self, handler):
        with self.counting:
            self.now += 1
            self.paused += 1
            self.most = max(self.most, self.paused)
        try:
            self.closing.wait(self.pause)
            # Before the client has its answer, and may ask for more.
            with self.counting:
                self.paused -= 1
            with contextlib.suppress(OSError):
                super().answer(handler)
        finally:
            with self.counting:
                self.now -= 1

    def asked(self, path):
        return [seen.target for seen in self.seen].count(path)


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(no_proxy):
    with running(Server) as server:
        yield server


@pytest.fixture
def other(no_proxy):
    with running(Server) as server:
        yield server


@pytest.fixture
def make():
    """Fetchers that wait little, and are closed, with all their threads."""
    with contextlib.ExitStack() as stack:

        def run(**options):
            fetcher = Fetcher(**{"backoff": 0.01, "timeout": 5.0} | options)
            stack.callback(fetcher.close)
            return fetcher

        before = workers()
        yield run
        stack.close()
        assert workers() <= before


def until(condition):
    """Waits for a condition that is met soon."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def workers():
    """The threads that fetch."""
    return {t for t in threading.enumerate() if "_work" in t.name}


def start(fetcher, urls):
    return [fetcher.workers.start(fetcher.read(url)) for url in urls]


def fails(fetcher, url, error=ImageFetchError):
    with pytest.raises(error) as caught:
        fetcher.fetch(url)
    return caught.value


def test_a_failure_that_passes(server, make):
    server.by_path["/a"].extend([Reply(503), Reply(503), Reply()])
    assert make().fetch(server.url + "/a") == BODY
    assert server.asked("/a") == 3


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_failure_that_may_pass_and_does_not(server, make, status):
    server.by_path["/a"].append(Reply(status))
    error = fails(make(retries=2), server.url + "/a")
    assert error.status == status
    assert str(status) in str(error)
    assert server.asked("/a") == 3


@pytest.mark.parametrize("status", [204, 400, 401, 403, 404, 410, 451, 501])
def test_a_failure_that_stays(server, make, status):
    server.by_path["/a"].append(Reply(status))
    error = fails(make(), server.url + "/a")
    assert error.status == status
    assert error.retry_after is None
    assert server.asked("/a") == 1


def test_a_connection_that_is_cut(server, make):
    server.by_path["/a"].extend([Reply(cut=0.5), Reply(cut=0.1), Reply()])
    assert make().fetch(server.url + "/a") == BODY
    assert server.asked("/a") == 3


def test_nobody_listens(no_proxy, make):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = fails(make(retries=1), f"http://127.0.0.1:{port}/a")
    assert error.transient
    assert error.status is None
    assert "ConnectionRefused" in str(error)


def test_a_server_that_is_silent(server, make):
    server.by_path["/a"].append(Reply(cut=0.5, stall=30))
    error = fails(make(timeout=0.2, retries=1), server.url + "/a")
    assert "within 0.2 seconds" in str(error)
    assert error.transient
    assert server.asked("/a") == 2


def test_what_is_never_tried_again(server, make):
    server.by_path["/loop"].append(Reply(302, headers={"Location": "/loop"}))
    assert "redirects" in str(fails(make(), server.url + "/loop"))
    assert server.asked("/loop") == 6
    fails(make(max_bytes=100), server.url + "/large", ImageTooLargeError)
    assert server.asked("/large") == 1
    assert "public" in str(fails(make(public_only=True), server.url + "/p"))
    assert server.asked("/p") == 0
    for url in (
        "ftp://h/a",
        "http://",
        "http://[::1",
        "nonsense",
        "http://h:x",
    ):
        assert not fails(make(), url).transient


def test_a_host_without_an_address(no_proxy, make, monkeypatch):
    calls = []

    def unknown(host, *rest, **options):
        calls.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    fails(make(), "http://nowhere.invalid/a")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.01),
        ("900", 60.0),
        ("9" * 400, 60.0),
        ("soon", 0.01),
        ("-5", 0.01),
        (email.utils.formatdate(0, usegmt=True), 0.01),
        (email.utils.formatdate(time.time() + 9e5, usegmt=True), 60.0),
    ],
    ids=["7", "0", "900", "huge", "text", "negative", "past", "future"],
)
def test_retry_after(server, make, retry_after, seconds):
    reply = Reply(429, headers={"Retry-After": retry_after})
    server.by_path["/a"].append(reply)
    error = fails(make(retries=0), server.url + "/a")
    wait = make(retries=1).wait(server.url + "/a", error, 0)
    assert seconds / 2 <= wait <= seconds


def test_retry_after_a_date_soon():
    from bit_tf import download

    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < download.retry_after(soon) <= 30


def test_retry_after_is_waited_for_by_the_whole_host(server, other, make):
    slow = Reply(429, headers={"Retry-After": "1"})
    server.by_path["/a"].extend([slow, Reply()])
    fetcher = make(per_host=1)
    begun = time.monotonic()
    ended = {}
    futures = {}
    for url in (server.url + "/a", server.url + "/b", other.url + "/c"):
        (futures[url],) = start(fetcher, [url])
        futures[url].add_done_callback(
            lambda _, path=url[-2:]: ended.setdefault(path, time.monotonic())
        )
    for future in futures.values():
        assert future.result() == BODY
    assert ended["/c"] - begun < 0.9
    assert ended["/a"] - begun > 0.95
    assert ended["/b"] - begun > 0.95


def test_waits_double_and_are_shortened_at_random(make):
    error = ImageFetchError("", status=500)
    fetcher = make(backoff=0.5, retries=9, longest_wait=20.0)
    for attempt, whole in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 16.0]):
        waits = {fetcher.wait(f"u{n}", error, attempt) for n in range(50)}
        assert len(waits) == 50
        assert whole / 2 <= min(waits) < 0.6 * whole
        assert 0.9 * whole < max(waits) <= whole
    assert fetcher.wait("u", error, 8) == 20.0
    assert fetcher.wait("u", error, 9) is None
    first, same, another = (
        make(seed=seed).wait("u", error, 0) for seed in (0, 0, 1)
    )
    assert first == same != another


def test_few_of_one_host_at_once(server, make):
    server.pause = 0.05
    urls = [f"{server.url}/{n}" for n in range(12)]
    futures = start(make(per_host=3), urls)
    assert [future.result() for future in futures] == [BODY] * 12
    assert server.most == 3


def test_few_in_all_at_once(server, other, make):
    server.pause = other.pause = 0.05
    one, two = ([f"{s.url}/{n}" for n in range(8)] for s in (server, other))
    futures = start(make(per_host=3, connections=4), one + two)
    for future in futures:
        assert future.result() == BODY
    assert server.most <= 3
    assert other.most <= 3
    assert server.most + other.most > 3


def test_a_burst_after_rest_takes_all_connections(server, make):
    """Threads that wait for work already are told once, not for each."""
    fetcher = make(connections=8, per_host=8)
    urls = [f"{server.url}/{number}" for number in range(32)]
    for url in urls[:3]:
        fetcher.fetch(url)
    until(lambda: fetcher.workers._idle == len(fetcher.workers._threads))
    server.pause = 0.2
    for future in start(fetcher, urls[:8]):
        assert future.result() == BODY
    assert server.most == 8


def test_a_slow_host_does_not_hold_up_a_fast_one(server, other, make):
    hold = threading.Event()
    server.by_path["/slow"].append(Reply(hold=hold))
    fetcher = make(per_host=2, connections=3)
    slow = start(fetcher, [server.url + "/slow"] * 6)
    fast = start(fetcher, [f"{other.url}/{n}" for n in range(20)])
    assert [future.result(5) for future in fast] == [BODY] * 20
    assert not any(future.done() for future in slow)
    hold.set()
    assert [future.result(5) for future in slow] == [BODY] * 6


def test_who_waits_for_another_try_takes_no_connection(server, make):
    server.by_path["/bad"].append(Reply(500))
    fetcher = make(connections=1, per_host=1, backoff=30.0)
    (bad,) = start(fetcher, [server.url + "/bad"])
    good = start(fetcher, [f"{server.url}/{n}" for n in range(5)])
    assert [future.result(5) for future in good] == [BODY] * 5
    assert not bad.done()
    assert server.asked("/bad") == 1


def test_cancel_ends_one_and_leaves_the_others(server, make):
    hold = threading.Event()
    server.by_path["/a"].append(Reply(hold=hold))
    fetcher = make(per_host=2)
    reads = [fetcher.read(server.url + "/a") for _ in range(4)]
    futures = [fetcher.workers.start(read) for read in reads]
    until(lambda: server.now == 2)
    fetcher.workers.cancel(reads[:3])
    (good,) = start(fetcher, [server.url + "/b"])
    assert good.result(5) == BODY
    assert [future.cancelled() for future in futures] == [True] * 3 + [False]
    hold.set()
    assert futures[3].result(5) == BODY


@pytest.mark.parametrize("state", ["body", "backoff", "queue"])
def test_close_is_quick(server, make, state):
    hold = threading.Event()
    reply = Reply(hold=hold) if state != "backoff" else Reply(500)
    server.by_path["/a"].append(reply)
    fetcher = make(backoff=50.0, per_host=1)
    futures = start(fetcher, [server.url + "/a"] * 3)
    until(lambda: server.seen)
    time.sleep(0.05)
    begun = time.monotonic()
    fetcher.close()
    assert time.monotonic() - begun < 1
    assert all(future.cancelled() for future in futures)
    hold.set()
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.fetch(server.url + "/a")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("full", [False, True], ids=["accepts", "full"])
def test_close_while_it_connects(no_proxy, make, scheme, full):
    fetcher = make(timeout=30.0)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server(("127.0.0.1", 0), backlog=0)
        )
        address = listener.getsockname()
        for _ in range(4 if full else 0):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        (future,) = start(fetcher, [f"{scheme}://127.0.0.1:{address[1]}/a"])
        time.sleep(0.2)
        assert not future.done()
        begun = time.monotonic()
        fetcher.close()
        assert time.monotonic() - begun < 1


def test_ctrl_c_while_it_waits(server, make):
    hold = threading.Event()
    server.by_path["/a"].append(Reply(hold=hold))
    fetcher = make(timeout=30.0)
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetcher.fetch(server.url + "/a")
    fetcher.close()
    assert time.monotonic() - begun < 2
    timer.join()
    hold.set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connections", 0),
        ("per_host", 0),
        ("retries", -1),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("max_bytes", 0),
        ("connections", 2.5),
        ("retries", float("inf")),
        ("timeout", float("inf")),
        ("timeout", 1e10),
        ("timeout", "5"),
    ],
)
def test_numbers_that_are_too_small(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*Received: {name}="):
        Fetcher(**{name: value})


def test_threads_end_without_work(server, make, monkeypatch):
    monkeypatch.setattr(fetching, "_IDLE", 0.05)
    fetcher = make()
    before = workers()
    for future in start(fetcher, [f"{server.url}/{n}" for n in range(8)]):
        assert future.result() == BODY
    until(lambda: workers() <= before)
    assert fetcher.fetch(server.url + "/again") == BODY


def test_what_a_read_raises_reaches_the_one_who_waits():
    workers = fetching.Workers(2)
    read = fetching.Read(lambda abort: 1 // 0, "lane", 1)
    try:
        with pytest.raises(ZeroDivisionError):
            workers.start(read).result()
    finally:
        workers.close()


def test_errors_keep_their_facts_when_pickled():
    import pickle

    error = ImageFetchError("text", status=503, retry_after=2.0, transient=True)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ImageError)
    assert str(again) == "text"
    assert (again.status, again.retry_after, again.transient) == (
        503,
        2.0,
        True,
    )
