"""The demo's web server, asked over real HTTP for each fault it can have, and the demo's URL list."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
from PIL import Image

from clips_data.demo import scenes, web

PATH = "/scenes/3/12.jpg"


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with web.serve() as address:
        yield address


def get(address: tuple[str, int], path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request("GET", path, headers={"Host": web.DEMO_HOST})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_a_scene_is_served_as_the_jpeg_of_its_picture(address: tuple[str, int]) -> None:
    response, body = get(address, PATH)
    assert response.status == 200 and response.version == 11
    assert response.headers["Content-Type"] == "image/jpeg"
    scene = scenes.make_scene(3, 12)
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.format == "JPEG" and picture.size == (scene.width_px, scene.height_px)
    assert body == web.jpeg(3, 12) != web.jpeg(3, 13)


def test_one_connection_serves_several_pictures(address: tuple[str, int]) -> None:
    connection = http.client.HTTPConnection(*address, timeout=30)
    bodies, sockets = [], set()
    for path in (PATH, PATH + "?fault=404", PATH + "?fault=redirect", PATH + "?fault=slow", PATH):
        connection.request("GET", path)
        bodies.append(connection.getresponse().read())
        sockets.add(connection.sock)
    connection.close()
    assert bodies[0] == bodies[3] == bodies[4] == web.jpeg(3, 12)
    assert len(sockets) == 1


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_status_stays_however_often_one_asks(address: tuple[str, int], status: int) -> None:
    assert [get(address, f"{PATH}?fault={status}")[0].status for _ in range(3)] == [status] * 3


@pytest.mark.parametrize("path", ["/", "/scenes/3/12.png", "/scenes/3/x.jpg", "/scenes/-1/2.jpg", "/../etc/passwd"])
def test_there_is_nothing_but_scenes(address: tuple[str, int], path: str) -> None:
    assert get(address, path)[0].status == 404


def test_429_names_a_wait_and_then_gives_the_picture(address: tuple[str, int]) -> None:
    refused, _ = get(address, PATH + "?fault=429")
    assert refused.status == 429 and int(refused.headers["Retry-After"]) >= 0
    other, _ = get(address, "/scenes/3/13.jpg?fault=429")
    assert other.status == 429, "another URL has its own count"
    response, body = get(address, PATH + "?fault=429")
    assert response.status == 200 and body == web.jpeg(3, 12)


def test_a_redirect_stays_on_the_host_that_was_asked_and_leads_to_the_picture(address: tuple[str, int]) -> None:
    response, _ = get(address, PATH + "?fault=redirect")
    assert response.status == 302
    target = urlsplit(urljoin(f"http://{web.DEMO_HOST}{PATH}?fault=redirect", response.headers["Location"]))
    assert target.netloc == web.DEMO_HOST
    assert get(address, target.path)[1] == web.jpeg(3, 12)


def test_a_slow_body_arrives_in_pieces_and_whole(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(f"GET {PATH}?fault=slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = list(iter(lambda: connection.recv(1 << 20), b""))
    assert len(received) > 2
    assert b"".join(received).endswith(b"\r\n\r\n" + web.jpeg(3, 12))


def test_a_truncated_picture_is_a_whole_answer_that_does_not_decode(address: tuple[str, int]) -> None:
    response, body = get(address, PATH + "?fault=truncated")
    assert response.status == 200 and int(response.headers["Content-Length"]) == len(body)
    assert web.jpeg(3, 12).startswith(body) and 0 < len(body) < len(web.jpeg(3, 12))
    with Image.open(io.BytesIO(body)) as picture, pytest.raises(OSError, match="truncated"):
        picture.load()


def test_a_page_is_passed_off_as_a_picture(address: tuple[str, int]) -> None:
    response, body = get(address, PATH + "?fault=html")
    assert response.status == 200 and response.headers["Content-Type"] == "image/jpeg"
    assert body.startswith(b"<html>")


def test_an_opt_out_comes_with_the_picture(address: tuple[str, int]) -> None:
    response, body = get(address, PATH + "?fault=noai")
    assert response.headers["X-Robots-Tag"] == "noai" and body == web.jpeg(3, 12)
    assert "X-Robots-Tag" not in get(address, PATH)[0].headers


def test_after_the_block_nobody_listens_even_if_a_client_stayed_connected() -> None:
    before = set(threading.enumerate())
    with web.serve() as address:
        idle = http.client.HTTPConnection(*address, timeout=30)
        idle.request("GET", PATH)
        idle.getresponse().read()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    idle.close()
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


def test_the_server_is_quiet(address: tuple[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    for fault in ("", *web.FAULTS):
        get(address, f"{PATH}?fault={fault}")
    with socket.create_connection(address, timeout=30) as connection:  # hangs up in the middle of a body
        connection.sendall(f"GET {PATH}?fault=slow HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.recv(10)
    get(address, PATH)
    assert capfd.readouterr() == ("", "")


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_is_a_function_of_its_world_and_grows_at_its_end() -> None:
    rows = web.demo_rows(300, 0)
    assert rows == web.demo_rows(300, 0) and rows[:200] == web.demo_rows(200, 0)
    assert rows != web.demo_rows(300, 1)


def test_a_row_names_the_fixed_host_its_scene_and_that_scenes_captions() -> None:
    rows = web.demo_rows(300, 2)
    assert len(rows) == 300
    for row in rows:
        assert set(row) == {"url", "caption", "scene", "captions"}
        world, index = map(int, row["scene"].split("/"))
        scene = scenes.make_scene(world, index)
        url = urlsplit(row["url"])
        assert (url.scheme, url.netloc, url.path) == ("http", "demo.clips.invalid", f"/scenes/{world}/{index}.jpg")
        assert row["caption"] == scenes.web_caption(scene)
        assert json.loads(row["captions"]) == scenes.five_captions(scene)


def test_about_one_row_in_twenty_meets_a_fault_and_every_fault_occurs() -> None:
    rows = web.demo_rows(3000, 0)
    faults = Counter(parse_qs(urlsplit(row["url"]).query).get("fault", [""])[0] for row in rows)
    assert set(faults) == {"", *web.FAULTS}
    assert 0.03 < 1 - faults[""] / len(rows) < 0.06


def test_two_rows_in_a_hundred_repeat_an_earlier_scene() -> None:
    rows = web.demo_rows(3000, 0)
    seen: set[str] = set()
    repeats = 0
    for row in rows:
        repeats += row["scene"] in seen
        seen.add(row["scene"])
    assert 0.01 < repeats / len(rows) < 0.03
