"""Who may ask a server for what: keys by route, hosts, headers; its page's files."""

from __future__ import annotations

import pytest
from starlette.routing import Route

from inference.serving.app import build_app
from inference.serving.auth import ApiKey, is_loopback
from inference.serving.engine import Overloaded
from inference.serving.page_files import PAGE, read_page
from inference.serving.routes import GuardedRoute
from inference.serving.service import Service
from tests.fake_engine import FakeEngine
from tests.serving_http import KEY, ROUTE, bearer, running, send, until_closed

PUBLIC = {"/health", "/", "/page/{name:path}"}


@pytest.fixture(scope="module")
def server():
    with running(key=ApiKey(KEY)) as one:
        yield one


def routes() -> list[Route]:
    """Of an application: behind its frame lies the router."""
    return build_app(Service(FakeEngine(), key=ApiKey(KEY))).app.routes


# ---- keys

def test_every_route_is_guarded_and_few_are_public():
    found = routes()
    assert all(type(route) is GuardedRoute and route.key is not None for route in found)
    assert {route.path for route in found if route.public} == PUBLIC


@pytest.mark.parametrize("path", [route.path for route in routes()])
def test_every_route_but_the_public_ones_needs_the_key(server, path):
    address = path.replace("{name:path}", "page.css").replace("{model:path}", "fake").replace("{image}", "x")
    for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "TRACE"):
        status = server.http.request(method, address).status_code
        assert (status == 401) == (path not in PUBLIC), (method, address, status)
    for headers in (bearer("wrong"), {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}):
        assert (server.http.get(address, headers=headers).status_code == 401) == (path not in PUBLIC)
    assert server.http.get(address, headers=bearer(KEY)).status_code != 401


@pytest.mark.parametrize("path", ["/nope", "/v1", "//v1/models", "/v1/models/", "/page", "/health/", "/HEALTH",
                                  "/%2e%2e/v1/models", "/page/../v1/models", "/health/../v1/models", "/v1%2Fmodels",
                                  "/v1/models?x=/health", "/v1/models#/health"])
def test_no_spelling_of_a_path_gets_around_the_key(server, path):
    sent = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reply = until_closed(send(server.port, sent.encode()))
    # a model's name is never said, and nothing but a public route answers
    assert b"fake" not in reply
    assert reply.split()[1] in (b"401", b"404")


def test_a_key_is_not_kept_in_words():
    assert KEY not in repr(vars(ApiKey(KEY)))


# ---- hosts

@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("LOCALHOST", 200),
    ("evil.example", 403),
    ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403), ("[::1", 403), ("0.0.0.0", 403)])
def test_a_server_on_loopback_answers_to_names_of_loopback_alone(server, host, status):
    reply = server.http.get("/health", headers={"Host": host})
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "host_not_allowed"


def test_a_server_for_other_machines_answers_to_any_name():
    with running(key=ApiKey(KEY), host="0.0.0.0") as server:
        assert server.http.get("/health", headers={"Host": "pictures.example"}).status_code == 200


def test_addresses_of_this_machine_alone():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "example.com", "127.0.0.1.example.com")))


# ---- headers

@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/"), ("GET", "/health"), ("GET", "/nope"), ("POST", ROUTE), ("GET", "/v1/models")])
def test_every_reply_has_the_security_headers(server, method, path):
    headers = server.http.request(method, path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert len(headers["x-request-id"]) == 32
    assert "server" not in headers


def test_no_other_site_may_read_replies(server):
    reply = server.http.options(ROUTE, headers={
        **bearer(KEY), "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nope", 404), ("DELETE", "/v1/models", 405), ("GET", ROUTE, 405), ("POST", "/health", 405),
    ("GET", "/page/nope.js", 404),
    ("GET", "/v1/models/nope", 404)])
def test_errors_of_the_router_have_openais_shape(server, method, path, status):
    reply = server.http.request(method, path, headers=bearer(KEY))
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in reply.headers) == (status == 405)


def test_words_of_an_image_that_is_kept(server):
    reply = server.http.get("/v1/images/image-7/words", headers=bearer(KEY))
    assert reply.json() == {"words": [{"word": "a", "start": 0, "end": 1, "weights": [[0.5] * 4] * 4}]}
    reply = server.http.get("/v1/images/nope/words", headers=bearer(KEY))
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (404, "image_not_found", "image")


def test_words_that_there_is_no_room_for_say_why(server, monkeypatch):
    def words(image_id: str):
        raise Overloaded(2.5, "the image's model does not fit")

    monkeypatch.setattr(server.engine, "words", words)
    reply = server.http.get("/v1/images/image-7/words", headers=bearer(KEY))
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
    assert reply.json()["error"]["message"] == "the image's model does not fit; try again in 3 s"


# ---- the page's files

def test_the_page_is_served_with_its_types_and_kept_by_browsers(server):
    page = server.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    assert server.http.get("/", headers={"If-None-Match": f'"x", {page.headers["etag"]}'}).status_code == 304
    for path in PAGE.iterdir():
        reply = server.http.get(f"/page/{path.name}")
        assert reply.content == path.read_bytes()
        assert reply.headers["content-type"].partition(";")[0] in {"text/html", "text/css", "text/javascript", "image/svg+xml"}


@pytest.mark.parametrize("name", [
    "../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "....//app.py", "page.css%00", ".", "", "..\\app.py"])
def test_only_the_pages_own_files_are_served(server, name):
    sent = f"GET /page/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert until_closed(send(server.port, sent.encode())).split()[1] == b"404"


def test_files_of_other_kinds_are_not_part_of_the_page(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("index.html", "a.py", ".hidden.js", "b.js~", "sub/c.js"):
        (tmp_path / name).write_text("x")
    assert set(read_page(tmp_path)) == {"index.html", "sub/c.js"}
