"""The coordinator's HTTP door and rank 0's client, as real processes."""

import hashlib
import json
import signal
import socket

import pytest

from sonoforge_trainer.contract import Activity, Progress
from sonoforge_trainer.coordinator_client import ProgressPublisher
from sonoforge_trainer.membership import Membership, Node, encode
from sonoforge_trainer.store_link import (
    ACKNOWLEDGED_KEY,
    ATTEMPT_KEY,
    PROGRESS_KEY,
    REQUESTS_KEY,
    StoreLink,
    membership_key,
    parse_endpoint,
)

SAVE = {"kind": "checkpoint", "node": "", "id": "save-1"}


def test_the_door_is_shut_without_the_token_and_strict_with_it(machines):
    """One coordinator, every answer: who is let in, what is understood, and how much of it."""
    assert machines.ask("/healthz", token=None) == (200, {"status": "ok"})
    for path, body in [("/progress", None), ("/nothing", None), ("/request", SAVE)]:
        for token in (None, "", "a-token-of-the-tests-012345678", "ä" * 20):
            assert machines.ask(path, body, token=token)[0] == 401, (path, token)

    assert machines.ask("/progress") == (200, Progress().document())
    assert machines.ask("/nothing")[0] == 404
    assert machines.ask("/progress", SAVE)[0] == 404

    status, answer = machines.ask("/request", {"kind": "reboot"})
    assert status == 422
    assert answer["error"].startswith("request.kind: found 'reboot'. Allowed: one of checkpoint, stop, lost")
    assert machines.ask("/request", {"kind": "stop", "forse": 1})[0] == 422
    assert machines.ask("/request", b"\x80\x04\x95")[0] == 422
    assert machines.ask("/request", {"kind": "lost"})[0] == 422
    assert machines.ask("/request", b" " * 16385)[0] == 413
    assert machines.ask("/request", {"kind": "lost", "node": "10.0.0.1"})[0] == 503, "nobody has joined yet"

    assert machines.ask("/request", SAVE) == (202, {"id": "save-1", "accepted": True})
    assert machines.ask("/request", SAVE) == (202, {"id": "save-1", "accepted": False})
    status, answer = machines.ask("/request", {"kind": "stop"})
    assert (status, answer["accepted"], len(answer["id"])) == (202, True, 32)
    link = StoreLink(*parse_endpoint(machines.store))
    assert [request["kind"] for request in json.loads(link.get(REQUESTS_KEY))] == ["checkpoint", "stop"]

    link.set(PROGRESS_KEY, '{"step": "many"}')
    assert machines.ask("/progress") == (502, {"error": "the store holds no readable progress"})


def test_sigterm_ends_the_coordinator_and_its_successor_takes_the_same_ports(machines):
    first = machines.processes["coordinator"]
    visitor = socket.create_connection(
        ("127.0.0.10", int(machines.http.rpartition(":")[2]))
    )  # says nothing, holds a place
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    visitor.close()
    store = machines.store
    machines.start_coordinator()
    assert machines.store == store
    assert machines.ask("/healthz", token=None)[0] == 200


def test_a_digest_of_the_token_is_enough_and_lets_nobody_in_by_itself(machines):
    """What a cluster's objects hold of a token is no secret: the file is read again at every visit."""
    token = "another-token-of-the-tests"
    digest = f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    (machines.folder / "token").write_text(digest)
    assert machines.ask("/progress", token=token)[0] == 200
    for wrong in (digest, f"{token}x", digest.removeprefix("sha256:")):
        assert machines.ask("/progress", token=wrong)[0] == 401, wrong


def test_a_coordinator_without_a_proper_token_does_not_start(machines, tmp_path):
    (tmp_path / "token").write_text("short\n")
    machines.kill("coordinator")
    machines._start("coordinator", ["-m", "sonoforge_trainer", "coordinator", "--token-file", str(tmp_path / "token")])
    assert machines.exit_code("coordinator") == 64
    assert "holds 5 characters; put at least 16 random ones into it" in machines.output()


def test_progress_and_requests_outlive_the_coordinator(machines):
    """What rank 0 published is there again in an empty successor; requests come until they are acknowledged."""
    newest = Progress(attempt="a", activity=Activity.TRAINING, step=7, losses={"dino": 2.5}, loss=2.5)

    def shown():
        return machines.ask("/progress") == (200, newest.document())

    with ProgressPublisher(machines.store, interval_seconds=0.2) as publisher:
        publisher.publish(Progress(step=6))
        publisher.publish(newest)
        machines.wait_for(shown, 20, "progress")

        machines.kill("coordinator")
        machines.start_coordinator()
        machines.wait_for(shown, 30, "progress in the successor")

        machines.ask("/request", SAVE)
        machines.ask("/request", {"kind": "stop", "id": "stop-1"})
        arrived = []
        machines.wait_for(lambda: arrived.extend(publisher.requests()) or len(arrived) == 2, 20, "requests")
        assert [request.id for request in arrived] == ["save-1", "stop-1"]
        publisher.acknowledge(arrived[0])

    with ProgressPublisher(machines.store, interval_seconds=0.2) as successor:
        arrived = []
        machines.wait_for(lambda: arrived.extend(successor.requests()) or arrived, 20, "requests again")
        assert [request.id for request in arrived] == ["stop-1"], "what was acknowledged is not done twice"


PRESENT, GONE = Progress(attempt="present", step=9), Progress(attempt="gone", step=7)


def join(link, attempt, *addresses):
    """Write that these nodes take part in an attempt, the newest one."""
    state = Membership()
    state.round, state.complete = 4, True
    state.participants = {Node(address, 1, 1): rank for rank, address in enumerate(addresses)}
    link.set(membership_key(attempt), encode(state))
    link.set(ATTEMPT_KEY, attempt)


def test_a_node_that_the_others_went_on_without_says_and_takes_nothing(machines):
    """Its worker may live on, as behind a cable that was plugged in again."""
    link = StoreLink(*parse_endpoint(machines.store))
    join(link, "a-1", "10.0.0.2", "10.0.0.3")
    with (
        ProgressPublisher(machines.store, attempt="a-1", address="10.0.0.1", interval_seconds=0.05) as former,
        ProgressPublisher(machines.store, attempt="a-1", address="10.0.0.2", interval_seconds=0.05) as publisher,
    ):
        former.publish(GONE)
        publisher.publish(PRESENT)
        machines.wait_for(lambda: machines.ask("/progress") == (200, PRESENT.document()), 20, "progress")
        machines.ask("/request", SAVE)
        arrived = []
        machines.wait_for(lambda: arrived.extend(publisher.requests()) or arrived, 20, "request")
        assert former.requests() == []
        publisher.acknowledge(arrived[0])
        machines.wait_for(lambda: b"save-1" in link.get(ACKNOWLEDGED_KEY), 20, "acknowledgement")
    assert json.loads(link.get(ACKNOWLEDGED_KEY)) == ["save-1"]


@pytest.mark.parametrize(
    ("attempt", "happens", "heard"),
    [
        ("a-1", lambda link: join(link, "a-1", "10.0.0.2"), False),
        ("a-1", lambda link: join(link, "a-1"), False),  # all have left
        ("a-9", lambda link: join(link, "a-10", "10.0.0.1"), False),
        ("a-10", lambda link: join(link, "a-9", "10.0.0.2"), True),  # an old agent that is back
        ("b", lambda link: join(link, "a", "10.0.0.2"), True),  # names without an order
        ("a-1", lambda link: join(link, "a-1", "10.0.0.1", "10.0.0.2"), True),
        ("a-1", lambda link: None, True),  # an empty store: its coordinator was replaced
        ("a-1", lambda link: (link.set(ATTEMPT_KEY, "a-1"), link.set(membership_key("a-1"), "[]")), True),
        ("", lambda link: join(link, "a-1", "10.0.0.2"), True),  # without agents of ours
    ],
)
def test_who_takes_part_in_the_newest_attempt_is_heard_as_is_who_cannot_know(machines, attempt, happens, heard):
    happens(StoreLink(*parse_endpoint(machines.store)))
    publisher = ProgressPublisher(machines.store, attempt=attempt, address="10.0.0.1", interval_seconds=60)
    publisher.publish(GONE)
    publisher.close()  # which sends what is newest
    assert machines.ask("/progress") == (200, GONE.document() if heard else Progress().document())


def test_the_training_loop_never_waits_for_a_coordinator_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        publisher = ProgressPublisher(f"127.0.0.1:{silent.getsockname()[1]}", interval_seconds=0.05)
        publisher.publish(Progress(step=1))
        assert publisher.requests() == []
        publisher.close()


@pytest.mark.parametrize("endpoint", ["nowhere", "host:0"])
def test_a_publisher_refuses_an_endpoint_that_is_none(endpoint):
    with pytest.raises(ValueError, match="give HOST:PORT"):
        ProgressPublisher(endpoint)
