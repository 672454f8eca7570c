"""The draft server, its clients, and what becomes of both when the other dies."""

import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_async.errors import ConfigError, FleetError
from seer_servers.drafting import wire
from seer_servers.drafting.address import check_address, prepared, socket_path
from seer_servers.drafting.client import MAX_INBOX, DraftClient
from seer_servers.drafting.link import Link, ask_stats
from seer_servers.drafting.replica import Replica
from seer_servers.drafting.server import DraftServer
from seer_servers.drafting.service import DraftService
from seer_servers.drafting.tokenlog import MAX_REQUESTS, OVERHEAD, Outcome, TokenLogs

TIMEOUT_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tokens_of(logs: TokenLogs, group: str, request: str) -> list[int]:
    return np.frombuffer(bytes(logs.logs(group).get(request, b"")), "<i4").tolist()


# Token logs


additions = st.lists(
    st.tuples(st.sampled_from("AB"), st.sampled_from("xyz"), st.integers(0, 20), st.integers(0, 12)), max_size=60
)


@given(additions)
def test_a_log_holds_exactly_the_unbroken_beginning_of_what_it_was_told(told):
    truth = {(g, r): [ord(g) * 1000 + ord(r) * 100 + i for i in range(40)] for g in "AB" for r in "xyz"}
    model = dict.fromkeys(truth, 0)
    logs = TokenLogs()
    for group, request, position, count in told:
        have = model[group, request]
        outcome = logs.append(group, request, position, wire.pack(truth[group, request][position : position + count]))
        end = position + count
        expected = Outcome.GAP if position > have else Outcome.ADDED if end > have else Outcome.KNOWN
        assert outcome is expected
        model[group, request] = end if expected is Outcome.ADDED else have
    for (group, request), length in model.items():
        assert tokens_of(logs, group, request) == truth[group, request][:length]
        assert logs.length(group, request) == length
        assert np.frombuffer(logs.since(group, request, 3, 5), "<i4").tolist() == truth[group, request][3:length][:5]
    assert logs.tokens == sum(model.values())
    assert logs.requests == sum(length > 0 for length in model.values())


def test_what_is_known_is_not_overwritten():
    logs = TokenLogs()
    logs.append("g", "r", 0, wire.pack([1, 2, 3]))
    assert logs.append("g", "r", 1, wire.pack([9, 9, 9])) is Outcome.ADDED
    assert tokens_of(logs, "g", "r") == [1, 2, 3, 9]


def test_a_group_lives_as_long_as_it_is_used():
    clock = Clock()
    logs = TokenLogs(clock=clock)
    logs.register("used", 10)
    logs.register("idle", 10)
    logs.append("unregistered", "r", 0, wire.pack([1]))
    logs.append("idle", "r", 0, wire.pack([1, 2, 3]))
    clock.now += 9
    logs.append("used", "r", 0, wire.pack([1]))
    clock.now += 9
    logs.expire()
    assert set(logs) == {"used", "unregistered"}
    clock.now += wire.DEFAULT_TTL_S
    logs.expire()
    assert len(logs) == 0
    assert logs.nbytes == 0
    assert logs.expired == 3
    assert logs.dropped_tokens == 5


def test_a_shorter_time_to_live_does_not_shorten_anothers():
    clock = Clock()
    logs = TokenLogs(clock=clock)
    logs.register("g", 5000)
    logs.register("g", 1)
    clock.now += 4999
    logs.expire()
    assert "g" in logs


def test_the_bound_evicts_the_least_recently_used_groups():
    logs = TokenLogs(max_tokens=3 * (2 * OVERHEAD + 100))
    for group in "abc":
        logs.append(group, "r", 0, wire.pack(range(100)))
    logs.append("a", "r", 100, wire.pack([1]))
    assert set(logs) == {"c", "a"}
    assert logs.evicted == 1
    assert logs.dropped_tokens == 100
    assert logs.nbytes <= 3 * (2 * OVERHEAD + 100) * wire.TOKEN_BYTES


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 300)), max_size=80))
def test_the_bound_always_holds(told):
    limit = 2000
    logs = TokenLogs(max_tokens=limit)
    for group, request, count in told:
        logs.append(str(group), str(request), logs.length(str(group), str(request)), wire.pack([7] * count))
        assert logs.tokens + OVERHEAD * (len(logs) + logs.requests) <= limit
        assert logs.nbytes == (logs.tokens + OVERHEAD * (len(logs) + logs.requests)) * wire.TOKEN_BYTES


def test_a_group_larger_than_the_bound_is_refused_and_evicts_nobody_twice():
    logs = TokenLogs(max_tokens=1000)
    logs.append("big", "r", 0, wire.pack(range(500)))
    assert logs.append("big", "r", 500, wire.pack(range(500))) is Outcome.FULL
    assert logs.length("big", "r") == 500
    assert logs.refused_tokens == 500


def test_requests_in_a_group_are_bounded():
    logs = TokenLogs()
    outcomes = [logs.append("g", str(number), 0, wire.pack([1])) for number in range(MAX_REQUESTS + 1)]
    assert outcomes[-2:] == [Outcome.ADDED, Outcome.FULL]
    assert logs.append("g", "0", 1, wire.pack([2])) is Outcome.ADDED


# Replicas and server, without sockets: messages may be lost, the server may start anew


class Wire:
    """Carries requests to a server that can be exchanged, through msgpack, and loses what it is told to."""

    def __init__(self, max_tokens: int = 1 << 20) -> None:
        self.max_tokens = max_tokens
        self.server = DraftServer(max_tokens)

    def restart(self) -> None:
        self.server = DraftServer(self.max_tokens)

    def sync(self, replica: Replica, *, lose: str = "") -> list:
        replica.ask(fetch=True)
        news = []
        for _ in range(200):
            request = replica.next_request()
            if request is None or lose == "request":
                return news
            message = self.server.answer(wire.encoder.encode(request))
            assert message is not None, f"the server did not understand {request}"
            if lose == "reply":
                return news
            news += replica.learn(request, wire.reply_decoder.decode(message))
        raise AssertionError("the replica has always something to say")


def test_siblings_arrive_once_and_ones_own_tokens_never():
    line, one, two = Wire(), Replica(), Replica()
    for replica in (one, two):
        replica.register("g", 60)
    one.take("g", "a", 0, [1, 2, 3])
    two.take("g", "b", 0, [7])
    assert line.sync(one) == []
    (news,) = line.sync(two)
    assert news[:3] == ("g", "a", 0)
    assert news.tokens.tolist() == [1, 2, 3]
    assert news.tokens.dtype == np.int32
    one.take("g", "a", 3, [4])
    assert [n.tokens.tolist() for n in line.sync(one)] == [[7]]
    assert [(n.prev_token_count, n.tokens.tolist()) for n in line.sync(two)] == [(3, [4])]
    assert line.sync(one) == line.sync(two) == []


def test_groups_that_are_not_ones_own_stay_away():
    line, one, two = Wire(), Replica(), Replica()
    one.take("g", "a", 0, [1])
    line.sync(one)
    two.register("other", 60)
    assert line.sync(two) == []


def test_a_request_that_moves_continues_where_the_other_engine_stopped():
    line, one, two = Wire(), Replica(), Replica()
    one.take("g", "a", 0, [1, 2, 3])
    line.sync(one)
    two.register("g", 60)
    two.take("g", "a", 0, [1, 2, 3, 4])  # resubmitted tokens before anything was fetched
    assert line.sync(two) == []
    two.take("g", "a", 4, [5])
    line.sync(two)
    assert [(n.prev_token_count, n.tokens.tolist()) for n in line.sync(one)] == [(3, [4, 5])]


def test_a_gap_on_the_server_is_filled_from_the_replica():
    line, one = Wire(), Replica()
    one.take("g", "a", 0, [1, 2, 3])
    line.sync(one)
    line.server.logs._drop("g")  # evicted, say
    one.take("g", "a", 3, [4])
    line.sync(one)
    assert tokens_of(line.server.logs, "g", "a") == [1, 2, 3, 4]
    assert line.server._gaps == 1


def test_a_gap_in_the_replica_is_counted_and_left_out():
    one = Replica()
    one.take("g", "a", 5, [1])
    assert one.gaps == 1
    assert one.next_request() is None


def test_a_new_server_is_filled_again():
    line, one, two = Wire(), Replica(), Replica()
    one.register("g", 123)
    one.take("g", "a", 0, list(range(1000)))
    line.sync(one)
    two.register("g", 60)
    two.take("g", "a", 0, [0])
    line.sync(two)
    two.take("g", "a", 1000, [7])  # the request has moved; this replica knows its beginning only from the other
    line.restart()
    assert line.sync(two) == []
    assert tokens_of(line.server.logs, "g", "a") == [*range(1000), 7]
    line.sync(one)
    assert line.server.logs._groups["g"].ttl_s == 123
    assert line.server._registrations == 2
    assert one.boots == two.boots == 2


def test_large_logs_travel_in_several_messages():
    line, one, two = Wire(4 << 20), Replica(), Replica()
    sizes = []
    answer = line.server.answer

    def measured(message: bytes) -> bytes:
        reply = answer(message)
        sizes.extend((len(message), len(reply)))
        return reply

    line.server.answer = measured
    for number in range(7):
        one.take("g", str(number), 0, [number] * (wire.BATCH_TOKENS // 3 + number))
    one.take("g", "huge", 0, [8] * (2 * wire.BATCH_TOKENS + 1))
    two.register("g", 60)
    line.sync(one)
    news = line.sync(two)
    assert {request: tokens_of(two.logs, "g", request) for request in two.logs.logs("g")} == {
        request: tokens_of(one.logs, "g", request) for request in one.logs.logs("g")
    }
    assert sum(len(n.tokens) for n in news) == one.logs.tokens
    assert max(sizes) < wire.BATCH_TOKENS * wire.TOKEN_BYTES * 1.1


def test_many_long_names_fit_into_messages():
    line, one, two = Wire(1 << 24), Replica(), Replica()
    names = [f"{number:04d}" + "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 200 for number in range(900)]
    for group in ("g", "h", "i"):
        two.register(group, 60)
        for name in names:
            one.take(group, name, 0, [1])
    line.sync(one)
    assert len(line.sync(two)) == 2700
    for _ in range(2):
        two.ask(fetch=True)
        while (request := two.next_request()) is not None:
            message = wire.encoder.encode(request)
            assert len(message) < wire.MAX_MESSAGE
            two.learn(request, wire.reply_decoder.decode(line.server.answer(message)))


def test_a_refused_request_is_not_sent_again_and_again():
    line, one = Wire(max_tokens=1000), Replica()
    one.take("g", "a", 0, [1] * 500)
    line.sync(one)
    one.take("g", "a", 500, [1] * 500)
    line.sync(one)
    sent = one.sent_tokens
    for position in range(1000, 1100):
        one.take("g", "a", position, [1])
        line.sync(one)
    assert one.sent_tokens == sent
    line.max_tokens = 1 << 20
    line.restart()
    line.sync(one)
    assert line.server.logs.length("g", "a") == 1100


def test_a_replica_without_room_does_not_fetch_the_same_forever():
    line, one, two = Wire(), Replica(), Replica(max_tokens=300)
    one.take("g", "a", 0, [1] * 500)
    line.sync(one)
    two.register("g", 60)
    assert line.sync(two) == []
    two.ask(fetch=True)
    request = two.next_request()
    assert wire.reply_decoder.decode(line.server.answer(wire.encoder.encode(request))).deltas == {}


@pytest.mark.parametrize(
    ("group", "request_", "position", "tokens"),
    [
        ("", "r", 0, [1]),
        ("g" * 257, "r", 0, [1]),
        ("g", "\ud800", 0, [1]),
        ("g", "r\x1b[2J", 0, [1]),
        ("g", "r", -1, [1]),
        ("g", "r", 0, [2**31]),
        ("g", "r", 0, ["a"]),
        ("g", "r", 0, []),
        (None, "r", 0, [1]),
        ("g", "r", "0", [1]),
        ("g", "r", 0, None),
    ],
)
def test_impossible_additions_are_counted_and_go_no_further(group, request_, position, tokens):
    one = Replica()
    one.take(group, request_, position, tokens)
    assert one.invalid == 1
    assert one.next_request() is None


def test_registering_again_soon_says_nothing():
    clock = Clock()
    line, one = Wire(), Replica(clock=clock)
    one.register("g", 600)
    line.sync(one)
    clock.now += 100
    one.register("g", 600)
    assert one.next_request() is None
    clock.now += 101
    one.register("g", 600)
    assert isinstance(one.next_request(), wire.Register)


def test_an_expired_group_is_forgotten_altogether():
    clock = Clock()
    line, one = Wire(), Replica(clock=clock)
    one.register("g", 10)
    one.take("g", "a", 0, [1, 2])
    line.sync(one)
    clock.now += 11
    one.expire()
    line.restart()
    line.sync(one)
    assert len(line.server.logs) == 0
    assert one._known() == {}


class Cluster:
    """Three replicas and a server that may forget everything; token `i` of a request is always the same."""

    def __init__(self) -> None:
        self.line = Wire()
        self.replicas = [Replica() for _ in range(3)]
        self.handed: list[dict[tuple[str, str], list[int]]] = [{} for _ in self.replicas]  # positions
        for replica in self.replicas:
            replica.register("g", 60)
            replica.register("h", 60)

    @staticmethod
    def truth(request: str, start: int, end: int) -> list[int]:
        return [i * 7 + ord(request) for i in range(start, end)]

    def take(self, index: int, group: str, request: str, count: int) -> None:
        """Continue a request from what the replica knows, as engines do with requests that move."""
        start = self.replicas[index].logs.length(group, request)
        self.replicas[index].take(group, request, start, self.truth(request, start, start + count))

    def sync(self, index: int, lose: str = "") -> None:
        for group, request, position, tokens in self.line.sync(self.replicas[index], lose=lose):
            end = position + len(tokens)
            assert tokens.tolist() == self.truth(request, position, end)
            self.handed[index].setdefault((group, request), []).extend(range(position, end))

    def restart(self) -> None:
        self.line.restart()


actions = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 2), st.sampled_from("gh"), st.sampled_from("ab"), st.integers(1, 5)),
    st.tuples(st.just("sync"), st.integers(0, 2), st.sampled_from(["", "", "request", "reply"])),
    st.just(("restart",)),
)


@given(st.lists(actions, max_size=60))
@settings(max_examples=200)
def test_replicas_come_to_know_all_that_the_living_have_whatever_is_lost(steps):
    cluster = Cluster()
    for name, *arguments in steps:
        getattr(cluster, name)(*arguments)
    for index in (0, 1, 2) * 2:
        cluster.sync(index)
    for group, request in itertools.product("gh", "ab"):
        known = [tokens_of(replica.logs, group, request) for replica in cluster.replicas]
        assert known == [cluster.truth(request, 0, max(map(len, known)))] * 3
    for handed in cluster.handed:
        assert all(positions == sorted(set(positions)) for positions in handed.values()), "handed over twice"


# Messages that make no sense


@given(st.binary(max_size=400))
def test_noise_is_not_answered_but_counted(noise):
    server = DraftServer()
    if server.answer(noise) is None:
        assert server.malformed == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.sampled_from("rufs"), st.lists(values, max_size=3))
def test_well_formed_nonsense_does_no_harm(tag, fields):
    server = DraftServer(max_tokens=10_000)
    server.answer(msgspec.msgpack.encode([tag, 1, *fields]))
    server.answer(msgspec.msgpack.encode([tag, *fields]))
    good = wire.Update(3, {"g": {"r": (0, wire.pack([1, 2]))}})
    assert wire.reply_decoder.decode(server.answer(wire.encoder.encode(good))).serial == 3


def test_half_tokens_are_refused():
    server = DraftServer()
    server.handle(wire.Update(1, {"g": {"r": (0, b"\x01\x02\x03")}}))
    assert server.logs.tokens == 0
    assert server.malformed == 1


# Addresses


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://0.0.0.0:5555", "other machines"),
        ("tcp://node7:5555", "other machines"),
        ("tcp://127.0.0.1", "must be"),
        ("tcp://127.0.0.1:99999", "must be"),
        ("http://127.0.0.1:80", "must be"),
        ("nonsense", "must be"),
        ("ipc://relative", "absolute"),
        ("ipc://@abstract", "absolute"),
        ("ipc:///" + "x" * 107, "107"),
    ],
)
def test_addresses_that_will_not_do(address, says):
    with pytest.raises(ConfigError, match=says):
        check_address(address)


def test_addresses_that_do():
    for address in ("tcp://127.0.0.1:5555", "tcp://[::1]:5555", "tcp://localhost:1", "ipc:///" + "x" * 106):
        check_address(address)
    check_address("tcp://10.0.0.7:5555", anywhere=True)


def test_a_folder_that_others_reach_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 700"), prepared(f"ipc://{tmp_path}/s"):
        pass


def test_a_folder_is_made_private_and_taken_away(tmp_path):
    with prepared(f"ipc://{tmp_path}/new/s"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "new").exists()


# Real processes


@pytest.fixture
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d")
    path = f"ipc://{folder}/d/s"
    if len(path) > 100:
        pytest.skip("the temporary folder's path is too long for a socket")
    return path


@contextmanager
def server_at(address: str, *options: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "seer_servers.drafting.server", "--address", address, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == f"draft server ready at {address}\n"
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(TIMEOUT_S)
        process.stdout.close()


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)
    return found


def stats_at(address: str) -> wire.Stats:
    """The counts of a server that is there, however late it answers."""
    return wait_until(lambda: ask_stats(address))


@contextmanager
def client(address: str, name: str = "test", **options):
    made = DraftClient(address, name=name, **options)
    try:
        yield made
    finally:
        made.close()
        wait_until(lambda: all(thread.name != f"seer-drafts-{name}" for thread in threading.enumerate()))


class Collector:
    def __init__(self, client: DraftClient) -> None:
        self.client = client
        self.tokens: dict[tuple[str, str], list[int]] = {}

    def look(self) -> dict:
        for group, request, position, tokens in self.client.fetched():
            known = self.tokens.setdefault((group, request), [])
            assert position == len(known)
            known += tokens.tolist()
        return self.tokens


def test_two_clients_exchange_tokens(address):
    with server_at(address), client(address, "one") as one, client(address, "two") as two:
        here, there = Collector(one), Collector(two)
        for each in (one, two):
            each.register_group("g", 60)
        truth = {"a": [], "b": []}
        for step in range(60):
            for each, name in ((one, "a"), (two, "b")):
                new = [step * 10 + k for k in range(step % 4)]
                each.update("g", name, len(truth[name]), new)
                truth[name] += new
            here.look(), there.look()
            time.sleep(0.005)
        wait_until(lambda: len(here.look().get(("g", "b"), ())) == len(truth["b"]))
        wait_until(lambda: len(there.look().get(("g", "a"), ())) == len(truth["a"]))
        assert here.tokens == {("g", "b"): truth["b"]}
        assert there.tokens == {("g", "a"): truth["a"]}
        stats = stats_at(address)
        assert (stats.groups, stats.requests, stats.tokens) == (1, 2, len(truth["a"]) * 2)
        assert stats.gaps == stats.malformed == 0
    assert not socket_path(address).parent.exists()


def test_a_server_that_was_killed_is_filled_again_by_its_clients(address):
    with client(address, "one") as one, client(address, "two") as two:
        with server_at(address) as process:
            for each in (one, two):
                each.register_group("g", 60)
            one.update("g", "a", 0, list(range(5000)))
            two.update("g", "b", 0, [5, 6])
            wait_until(lambda: stats_at(address).tokens == 5002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        one.update("g", "a", 5000, [1, 2, 3])  # while nobody is there
        with server_at(address):
            stats = wait_until(lambda: (stats := stats_at(address)).tokens == 5005 and stats)
            assert stats.registrations >= 2
            third = Collector(DraftClient(address, name="late"))
            third.client.register_group("g", 60)
            wait_until(lambda: len(third.look()) == 2)
            third.client.close()
            assert third.tokens == {("g", "a"): [*range(5000), 1, 2, 3], ("g", "b"): [5, 6]}
            assert one.stats()["sync_boots"] == 2


def test_a_client_that_only_adds_notices_a_new_server_too(address):
    """As the API process does, whose reference sequences nobody else has."""
    with client(address) as one:
        with server_at(address) as process:
            one.update("g", "reference", 0, [1, 2, 3])
            wait_until(lambda: one.stats()["sync_sent_tokens"] == 3)
            process.kill()
            process.wait()
        with server_at(address):
            wait_until(lambda: stats_at(address).tokens == 3)


def test_an_absent_server_costs_nothing(address):
    with client(address) as one:
        one.register_group("g", 60)
        started = time.thread_time()
        for position in range(2000):
            one.update("g", "a", position, [position])
            one.fetched()
        took = time.thread_time() - started
        wait_until(lambda: one._replica.logs.length("g", "a") == 2000)
        spent, began = one.stats()["sync_cpu_s"], time.monotonic()
        time.sleep(1.0)
        assert one.stats()["sync_cpu_s"] - spent < 0.2 * (time.monotonic() - began)
        stats = one.stats()
        assert stats["sync_messages"] == stats["sync_dropped"] == stats["sync_connected"] == 0
        assert took < 1.0
        with server_at(address):
            wait_until(lambda: stats_at(address).tokens == 2000)


def test_the_queue_is_bounded(address):
    with client(address, batch_s=3600) as one:
        for position in range(MAX_INBOX + 10):
            one.update("g", "a", position, [1])
        assert one.stats()["sync_dropped"] == 10


def test_a_server_that_hangs_is_left_waiting(address):
    with server_at(address) as process, client(address) as one:
        one.update("g", "a", 0, [1])
        wait_until(lambda: one.stats()["sync_connected"])
        process.send_signal(signal.SIGSTOP)
        one.update("g", "a", 1, [2])
        wait_until(lambda: one.stats()["sync_timeouts"])
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: stats_at(address).tokens == 2)


def test_hostile_peers_do_not_disturb_others(address):
    rng = random.Random(0)
    good = wire.encoder.encode(wire.Fetch(1, {}))
    with server_at(address), client(address) as one, zmq.Context() as context:
        one.update("g", "a", 0, [1, 2, 3])
        wait_until(lambda: one.stats()["sync_sent_tokens"] == 3)
        messages = [
            [b""],
            [good, good],
            [b"x"] * 500,
            [rng.randbytes(1000)],
            [b"\x93" * 100_000],  # arrays in arrays
            [pickle.dumps(os.getpid)],
            [b"\xc1"],
            [msgspec.msgpack.encode(["u", 1, {"g": {"a": [-5, b"1234"]}}])],
            [msgspec.msgpack.encode(["u", 1, {"g": {"a": [2**62, b"1234"]}}])],
            [msgspec.msgpack.encode(["r", 1, {"g": float("nan")}])],
            [msgspec.msgpack.encode(["r", 1, {"g": -1.0}])],
            [bytes(wire.MAX_MESSAGE + 1)],
        ]
        for frames in messages:
            with context.socket(zmq.DEALER) as peer:
                peer.setsockopt(zmq.LINGER, int(TIMEOUT_S * 1000))
                peer.connect(address)
                peer.send_multipart(frames)
        with context.socket(zmq.DEALER) as deaf:  # asks and never reads
            deaf.setsockopt(zmq.LINGER, 0)
            deaf.connect(address)
            for _ in range(1000):
                deaf.send(wire.encoder.encode(wire.AskStats(1)))
            stats = wait_until(lambda: (stats := stats_at(address)).malformed >= len(messages) - 2 and stats)
        assert stats.tokens == 3
        one.update("g", "a", 3, [4])
        wait_until(lambda: stats_at(address).tokens == 4)
        assert stats_at(address).boot == stats.boot


@contextmanager
def impostor(address):
    """A socket in the server's place."""
    socket_path(address).parent.mkdir(mode=0o700)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        yield socket


def test_a_hostile_server_does_not_disturb_a_client(address):
    """One that answers nonsense, and then the real one."""
    with client(address) as one:
        with impostor(address) as liar:
            one.update("g", "a", 0, [1])
            assert liar.poll(TIMEOUT_S * 1000)
            peer, _ = liar.recv_multipart()
            for lie in (b"", b"\xc1", b"\x93" * 100_000, pickle.dumps(1), msgspec.msgpack.encode(["d", 99, "boot"])):
                liar.send_multipart([peer, lie])
            wait_until(lambda: one.stats()["sync_timeouts"])
        with server_at(address):
            wait_until(lambda: stats_at(address).tokens == 1)


def test_what_a_server_sends_as_tokens_and_is_none_is_counted(address):
    """Its replies are in order but for that; the real server, which comes later, finds a client that works."""
    with client(address) as one:
        with impostor(address) as liar:
            one.register_group("g", 60)
            assert one.fetched() == []
            wait_until(lambda: lied(liar) and one.stats()["sync_malformed"])
            assert one.fetched() == []
        with server_at(address):
            one.update("g", "a", 0, [1])
            wait_until(lambda: stats_at(address).tokens == 1)
        assert one.stats()["sync_failures"] == 0


def lied(liar):
    """Answer what clients have asked; every token of a sibling's takes five bytes."""
    while liar.poll(0):
        peer, message = liar.recv_multipart()
        serial, asked = (request := wire.request_decoder.decode(message)).serial, isinstance(request, wire.Fetch)
        lie = wire.Fetched(serial, "b", {"g": {"x": (0, b"12345")}}, more=False) if asked else wire.Done(serial, "b")
        liar.send_multipart([peer, wire.encoder.encode(lie)])
    return True


def test_an_error_does_not_end_the_clients_thread(address, monkeypatch, caplog):
    with server_at(address), client(address) as one:
        plain, errors = one._replica.learn, [ValueError("first"), KeyError("second")]

        def learn(request, reply):
            if errors:
                raise errors.pop(0)
            return plain(request, reply)

        monkeypatch.setattr(one._replica, "learn", learn)
        one.update("g", "a", 0, [1])
        wait_until(lambda: one.stats()["sync_sent_tokens"] == 1)
        assert one.stats()["sync_failures"] == 2
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError]


def test_the_bound_and_a_groups_end_on_a_real_server(address):
    with server_at(address, "--max-tokens", "2000"), client(address) as one:
        for group in range(10):
            one.register_group(f"g{group}", 60)
            one.update(f"g{group}", "a", 0, [group] * 300)
        wait_until(lambda: one.stats()["sync_sent_tokens"] == 3000)
        stats = wait_until(lambda: (stats := stats_at(address)).evicted and stats)
        assert stats.bytes <= 2000 * wire.TOKEN_BYTES
        link = Link()
        with link.open(address):
            link.exchange(wire.Register(1, {"short": 0.5}), connect_s=TIMEOUT_S)
            assert wait_until(lambda: stats_at(address).expired) == 1


def test_one_address_has_one_server(address):
    with server_at(address):
        with pytest.raises(FleetError, match="another draft server"), prepared(address):
            pass
        second = [sys.executable, "-m", "seer_servers.drafting.server", "--address", address]
        done = subprocess.run(second, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == FleetError.exit_code
        assert "another draft server" in done.stderr
        assert stats_at(address)


def _child(client: DraftClient, name: str) -> None:
    client.update("g", name, 0, [1, 2, 3])
    deadline = time.monotonic() + TIMEOUT_S
    while client.stats()["sync_sent_tokens"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_client_works_in_a_child_process(address, method):
    with server_at(address), client(address) as one:
        one.update("g", "parent", 0, [1])
        wait_until(lambda: one.stats()["sync_sent_tokens"] == 1)
        child = multiprocessing.get_context(method).Process(target=_child, args=(one, method))
        child.start()
        child.join(3 * TIMEOUT_S)  # it waits for the server itself
        assert child.exitcode == 0
        one.update("g", "parent", 1, [2])
        wait_until(lambda: stats_at(address).tokens == 5)


def test_a_process_ends_without_closing_its_client(address):
    code = (
        "from seer_servers.drafting.client import DraftClient; import time\n"
        f"c = DraftClient({address!r}, name='x'); c.update('g', 'r', 0, [1]); time.sleep(0.2)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=TIMEOUT_S, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_client_takes_nothing_and_does_not_mind(address):
    with client(address) as one:
        one.close()
        one.update("g", "a", 0, [1])
        one.register_group("g", 5)
        assert one.fetched() == []
        assert not one._inbox


# The fleet's service


async def test_the_service_keeps_its_server_alive_and_leaves_nothing_behind(tmp_path):
    import asyncio

    import psutil

    service = DraftService(tmp_path)
    await service.start()
    address = service.env(0)["SEER_DRAFT_SERVER"]
    try:
        folder = socket_path(address).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        with client(address) as one:
            one.update("g", "a", 0, [1, 2, 3])
            while (stats := await asyncio.to_thread(stats_at, address)).tokens < 3:
                await asyncio.sleep(0.02)
            guard = psutil.Process(service._service.process.pid)
            guard.children()[0].kill()
            boot = stats.boot
            async with asyncio.timeout(TIMEOUT_S):
                while (stats := await asyncio.to_thread(stats_at, address)).tokens < 3:
                    await asyncio.sleep(0.02)
            assert stats.boot != boot
    finally:
        await service.stop()
    assert not folder.exists()
    assert await asyncio.to_thread(ask_stats, address, connect_s=0.1) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["draft-server.log", "logs"]


async def test_the_service_on_tcp(tmp_path):
    import asyncio

    service = DraftService(tmp_path, host="127.0.0.1")
    await service.start()
    try:
        assert service.address.startswith("tcp://127.0.0.1:")
        assert (await asyncio.to_thread(stats_at, service.address)).groups == 0
    finally:
        await service.stop()


async def test_a_service_that_cannot_start_says_why(tmp_path):
    service = DraftService(tmp_path, host="192.0.2.1")  # an address for documentation, nobody's
    with pytest.raises(FleetError, match="cannot listen"):
        await service.start()


def test_the_servers_log_survives_its_owner(tmp_path):
    """An owner that is killed takes its server and the server's folder along."""
    code = (
        "import asyncio, sys; from pathlib import Path; from seer_servers.drafting.service import DraftService\n"
        f"async def main():\n s = DraftService(Path({str(tmp_path)!r})); await s.start()\n"
        " print(s.address, flush=True)\n"
        " await asyncio.sleep(60)\nasyncio.run(main())"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    address = owner.stdout.readline().strip()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not socket_path(address).parent.exists())
    assert Path(tmp_path / "logs" / "draft-server.log").read_text().startswith("draft server ready")
