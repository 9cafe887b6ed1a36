"""What bounds a server: bodies, queue, deadline, clients that leave or stall, connections, and its end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import pytest

from inference.serving import images
from inference.serving.limits import Limits
from tests.fake_engine import FakeEngine
from tests.serving_http import ROUTE, request_bytes, running, send, until_closed, wait_for

ASKED = {"prompt": "a red heart", "seed": 1}


@pytest.fixture(scope="module")
def server():
    """Jobs wait until a test plays them."""
    with running(FakeEngine(plays=False)) as one:
        yield one


def error_of(reply: bytes) -> tuple[int, dict]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# ---- size

@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_more_than_64_kib_is_refused(server, chunked):
    body = json.dumps({"prompt": "x" * 70_000}).encode()
    content = iter([body]) if chunked else body
    reply = server.http.post(ROUTE, content=content, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_an_announced_length_is_refused_before_it_comes(server):
    head = (f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 99999999\r\n\r\n")
    connection = send(server.port, head.encode())
    assert b"413" in connection.recv(1000)
    connection.close()


def test_headers_are_bounded(server):
    status, error = error_of(until_closed(send(
        server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_what_is_no_http_is_answered_in_the_same_shape(server):
    status, error = error_of(until_closed(send(server.port, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")))
    assert (status, error["code"]) == (400, "bad_request")


# ---- queue and deadline

def test_a_full_queue_is_429_with_the_time_to_wait():
    with running(FakeEngine(plays=False, queue=2)) as server:
        waiting = [send(server.port, request_bytes(ASKED)) for _ in range(2)]
        wait_for(lambda: len(server.engine.waiting) == 2)
        reply = server.http.post(ROUTE, json=ASKED)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
        assert reply.json()["error"]["type"] == "rate_limit_error"
        server.engine.waiting[0].play()
        assert b"200 OK" in waiting[0].recv(1000)
        for connection in waiting:
            connection.close()


def test_a_job_is_cancelled_at_the_deadline():
    with running(FakeEngine(plays=False), Limits(deadline=0.2)) as server:
        reply = server.http.post(ROUTE, json=ASKED)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        [job] = server.engine.jobs
        assert job.cancelled
        assert 'tokenloom_cancelled_total{reason="deadline_exceeded"} 1.0' in server.http.get("/metrics").text


def test_a_stream_that_has_begun_says_the_deadline_as_an_event(monkeypatch):
    monkeypatch.setattr(images, "QUIET_SECONDS", 0.02)
    with running(FakeEngine(plays=False), Limits(deadline=0.4)) as server:
        with server.http.stream("POST", ROUTE, json={**ASKED, "stream": True}) as reply:
            events = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: ")]
        assert reply.status_code == 200
        assert events[-1]["type"] == "error"
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert server.engine.jobs[0].cancelled


def test_a_silent_stream_is_kept_open_by_comments(server, monkeypatch):
    monkeypatch.setattr(images, "QUIET_SECONDS", 0.02)
    with server.http.stream("POST", ROUTE, json={**ASKED, "stream": True}) as reply:
        lines = reply.iter_lines()
        assert next(lines) == ": still drawing"
        server.engine.waiting[-1].play()
        assert "event: image_generation.completed" in list(lines)


# ---- clients that leave or stall

@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(server, stream):
    """25 of each kind, of which some leave while their image is drawn."""
    jobs = []
    for number in range(25):
        connection = send(server.port, request_bytes({**ASKED, "stream": stream, "partial_images": 3 if stream else 0}))
        wait_for(lambda: server.engine.waiting)
        [job] = server.engine.waiting
        if number % 2:
            job.start()
            job.partial(0)
        connection.close()
        wait_for(lambda job=job: job.cancelled)
        jobs.append(job)
    assert len({id(job) for job in jobs}) == 25
    wait_for(lambda: server.service.active == 0)
    assert not server.engine.waiting


def test_a_client_that_has_left_is_in_the_metrics(server):
    before = cancelled(server)
    connection = send(server.port, request_bytes(ASKED))
    wait_for(lambda: server.engine.waiting)
    connection.close()
    wait_for(lambda: cancelled(server) == before + 1)


def cancelled(server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    found = [line.split()[-1] for line in lines if line.startswith('tokenloom_cancelled_total{reason="client_left"}')]
    return float(found[0]) if found else 0.0


@pytest.mark.parametrize(("sent", "replies"), [
    (b"", 0), (b"POST /v1/im", 0), (request_bytes(ASKED)[:-5], 0),
    (request_bytes(ASKED) + request_bytes(ASKED)[:-5], 1)])  # the second one is sent during the first one's reply
def test_a_request_that_does_not_arrive_is_cut_off(sent, replies):
    with running(limits=Limits(read=0.1)) as server:
        assert until_closed(send(server.port, sent)).count(b"HTTP/1.1 200 OK") == replies
        assert server.http.get("/health").status_code == 200


def test_a_byte_now_and_then_buys_no_time():
    with running(limits=Limits(read=0.3)) as server:
        connection = send(server.port, b"GET /health HTTP/1.1\r\n")
        ended = threading.Event()

        def drip() -> None:
            try:
                while not ended.wait(0.05):
                    connection.sendall(b"X: y\r\n")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        assert until_closed(connection) == b""
        ended.set()
        thread.join()


def test_a_slow_drawing_is_not_cut_off_with_its_request():
    with running(FakeEngine(plays=False), Limits(read=0.1)) as server:
        connection = send(server.port, request_bytes(ASKED))
        wait_for(lambda: server.engine.waiting)
        with pytest.raises(TimeoutError):
            connection.settimeout(0.3)
            connection.recv(1)
        server.engine.waiting[0].play()
        connection.settimeout(30)
        assert b"200 OK" in connection.recv(1000)
        connection.close()


@pytest.mark.long
def test_a_client_that_does_not_read_is_cut_off():
    with running(FakeEngine(plays=False), Limits(write=0.2)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request_bytes({**ASKED, "stream": True, "partial_images": 3}))
        wait_for(lambda: server.engine.waiting)
        [job] = server.engine.waiting
        job.start()
        for _ in range(120):
            job.partial(0, side=160)
        wait_for(lambda: job.cancelled)
        wait_for(lambda: server.service.active == 0)
        connection.close()


def test_connections_are_bounded():
    with running(limits=Limits(connections=3)) as server:
        first = [send(server.port, b"") for _ in range(3)]
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        status, error = error_of(until_closed(send(server.port, b"")))
        assert (status, error["code"]) == (503, "unavailable")
        for connection in first:
            connection.close()
        wait_for(lambda: not server.server.server_state.connections)
        assert server.http.get("/health").status_code == 200


# ---- the end

def test_a_stopped_server_finishes_what_it_draws():
    with running(FakeEngine(plays=False)) as server:
        connection = send(server.port, request_bytes(ASKED))
        wait_for(lambda: server.engine.waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        assert server.http.get("/ready").json() == {"ready": False, "reason": "shutting down"}
        reply = server.http.post(ROUTE, json=ASKED)
        assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (
            503, "shutting_down", "5")
        assert server.http.get("/v1/images/image-7/words").json()["error"]["code"] == "shutting_down"
        assert server.http.get("/health").status_code == 200
        server.engine.waiting[0].play()
        assert b"200 OK" in until_closed(connection)
        wait_for(lambda: server.server.should_exit)


def test_the_end_of_a_stop_does_not_move():
    with running(limits=Limits(drain=20)) as server:
        assert server.server.seconds_left == 20
        server.server._drain_until = time.monotonic() - 1  # a stop that has used its time
        assert server.server.seconds_left == 0


def test_words_that_are_waited_for_are_answered_before_the_end():
    answer: Future = Future()
    with running() as server:
        server.engine.words = lambda image_id: answer
        connection = send(server.port, b"GET /v1/images/image-7/words HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: server.service.active == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        answer.set_result([])
        assert b'{"words":[]}' in until_closed(connection)


def test_what_is_not_done_in_time_is_told_so():
    with running(FakeEngine(plays=False), Limits(drain=0.2)) as server:
        connection = send(server.port, request_bytes(ASKED))
        wait_for(lambda: server.engine.waiting)
        [job] = server.engine.waiting
        server.server.handle_exit(signal.SIGTERM, None)
        status, error = error_of(until_closed(connection))
        assert (status, error["code"]) == (503, "shutting_down")
        assert job.cancelled


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr("inference.serving.server.os._exit", ended.append)
    with running(FakeEngine(plays=False)) as server:
        connection = send(server.port, request_bytes(ASKED))
        wait_for(lambda: server.engine.waiting)
        server.server.handle_exit(signal.SIGINT, None)
        assert not ended
        server.server.handle_exit(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM]
        connection.close()


def test_a_dead_model_thread_ends_the_server():
    with running() as server:
        server.engine.ready = False
        wait_for(lambda: server.server.should_exit)
        assert server.server.failed


def test_ready_waits_for_the_model():
    with running() as server:
        server.service.loading = True
        reply = server.http.get("/ready")
        assert (reply.status_code, reply.json()) == (503, {"ready": False, "reason": "loading the model"})
        server.service.loading = False
        assert server.http.get("/ready").json() == {"ready": True}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", trust_env=False)
