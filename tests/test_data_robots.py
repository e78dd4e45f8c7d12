"""robots.txt, asked of real servers through the guarded GET."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from webmaker import Answer, Web, reply

from clips_data import fetch, robots
from clips_data.fetch import Fetched, FetchPolicy

BODY = b"an image"


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    robots.forget()
    yield
    robots.forget()


def policy(**changes: Any) -> FetchPolicy:
    values: dict[str, Any] = {"timeout_s": 5.0, "retries": 1, "max_wait_s": 0.05, "max_image_bytes": 50_000}
    return FetchPolicy(**{**values, "allow_network": ("127.0.0.0/8",), "robots": True, **changes})


def site(robots_txt: Answer) -> Web:
    return Web(lambda path, head: robots_txt if path == "/robots.txt" else reply(200, BODY))


def get(web: Web, path: str, **changes: Any) -> Fetched:
    return fetch.fetch(f"http://127.0.0.1:{web.port}{path}", policy(**changes))


RULES = b"""\xef\xbb\xbf# comment
User-agent: *
Disallow: /

User-agent: clips
User-agent: otherbot
Disallow: /private
Allow: /private/but-this
Disallow: /*.gif$
Disallow: /search?q=
"""


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/open.jpg", "ok"), ("/private/a.jpg", "opt_out"), ("/private/but-this.jpg", "ok"), ("/a/b.gif", "opt_out"),
        ("/a/b.gif?x", "ok"), ("/search?q=1", "opt_out"), ("/search?p=1", "ok"), ("//[private/a.jpg", "ok"),
    ],
)  # fmt: skip
def test_the_rules_for_our_name_decide_by_path_and_query(path: str, code: str) -> None:
    with site(reply(200, RULES)).serve() as web:
        fetched = get(web, path)
        assert (fetched.code, fetched.attempts) == (code, 1)
        assert web.hits[path] == (1 if code == "ok" else 0)
        if code == "opt_out":
            assert fetched.evidence == "robots.txt of 127.0.0.1: Disallow for clips"


def test_the_rules_for_all_hold_for_another_name() -> None:
    with site(reply(200, RULES)).serve() as web:
        assert get(web, "/open.jpg", user_agent="somebot").code == "opt_out"
        assert get(web, "/open.jpg", user_agent="otherbot").code == "ok"


@pytest.mark.parametrize(
    ("answer", "code", "evidence"),
    [
        (reply(404), "ok", ""),
        (reply(403, b"User-agent: *\nDisallow: /"), "ok", ""),
        (reply(200), "ok", ""),
        (reply(200, b"<html>\x00\xff Disallow: /</html>"), "ok", ""),
        (reply(500), "opt_out", "robots.txt of 127.0.0.1: not given (HTTP 500), so nothing is allowed"),
        (
            reply(429, Retry_After="0"),
            "opt_out",
            "robots.txt of 127.0.0.1: not given (HTTP 429), so nothing is allowed",
        ),
        (reply(302, Location="/robots.txt"), "ok", ""),
        (reply(302, Location="http://10.0.0.1/robots.txt"), "blocked_address", ""),
    ],
)
def test_a_robots_txt_that_is_not_there_allows_and_one_that_is_not_given_forbids(
    answer: bytes, code: str, evidence: str
) -> None:
    with site(answer).serve() as web:
        fetched = get(web, "/a.jpg")
        assert (fetched.code, fetched.evidence) == (code, evidence)
        assert web.hits["/a.jpg"] == (code == "ok")


def test_a_robots_txt_that_does_not_come_in_time_forbids() -> None:
    drip = [b"HTTP/1.1 200 OK\r\n\r\n", *([b"#", 0.05] * 200)]
    with site(drip).serve() as web:
        fetched = get(web, "/a.jpg", timeout_s=0.3, retries=0)
        assert fetched.code == "opt_out"
        assert "no complete answer within 0.3 s" in fetched.evidence


def test_a_host_that_is_not_there_is_not_called_an_opt_out() -> None:
    with site(reply(404)).serve() as web:
        port = web.port
    assert fetch.fetch(f"http://127.0.0.1:{port}/a.jpg", policy()).code == "connect"
    robots.forget()
    assert fetch.fetch(f"http://127.0.0.1:{port}/a.jpg", policy(allow_network=())).code == "blocked_address"


def test_robots_txt_follows_redirects_to_other_places() -> None:
    with site(reply(200, b"User-agent: clips\nDisallow: /no")).serve() as other:
        location = f"http://127.0.0.1:{other.port}/robots.txt"
        with site(reply(301, Location=location)).serve() as web:
            assert [get(web, path).code for path in ("/no", "/yes")] == ["opt_out", "ok"]


def test_each_place_that_a_redirect_leads_to_is_asked_for_its_own_rules() -> None:
    with site(reply(200, b"User-agent: *\nDisallow: /secret")).serve() as other:
        targets = {"/a": "/secret/a", "/b": "/open/b"}

        def answer(path: str, head: str) -> Answer:
            if path == "/robots.txt":
                return reply(404)
            return reply(302, Location=f"http://127.0.0.1:{other.port}{targets[path]}")

        with Web(answer).serve() as web:
            assert [get(web, path).code for path in ("/a", "/b")] == ["opt_out", "ok"]
            assert other.hits["/secret/a"] == 0


def test_only_the_first_half_megabyte_is_read_and_a_cut_rule_does_not_count() -> None:
    rules = b"User-agent: *\nDisallow: /early\n"
    rules += (
        b"#" * (robots.MAX_ROBOTS_BYTES - len(rules) - len(b"\nDisallow: /o"))
        + b"\nDisallow: /other\nDisallow: /late\n"
    )
    with site(reply(200, rules)).serve() as web:
        assert [get(web, path).code for path in ("/early", "/o", "/other", "/late")] == ["opt_out", "ok", "ok", "ok"]


def test_rules_made_to_be_slow_are_not() -> None:
    """With a backtracking matcher each of these would run for longer than anybody can wait."""
    rules = b"User-agent: *\n" + b"Disallow: /" + b"*a" * 200 + b"b$\n" + b"Disallow: /" + b"a*" * 5000 + b"$x\n"
    with site(reply(200, rules)).serve() as web:
        assert get(web, "/" + "a" * 5000).code == "ok"


def test_it_is_asked_once_by_many_threads_and_read_from_the_folder_by_the_next_process(tmp_path: Path) -> None:
    with site(reply(200, b"User-agent: clips\nDisallow: /no")).serve() as web:
        with ThreadPoolExecutor(16) as pool:
            paths = [f"/{'no' if number % 2 else 'yes'}/{number}" for number in range(64)]
            codes = list(pool.map(lambda path: get(web, path, robots_folder=tmp_path).code, paths))
        assert codes == ["ok", "opt_out"] * 32
        assert web.hits["/robots.txt"] == 1
        robots.forget()
        assert get(web, "/no/more", robots_folder=tmp_path).code == "opt_out"
        assert web.hits["/robots.txt"] == 1
        (file,) = tmp_path.rglob("*.json")
        assert json.loads(file.read_text())["robots_url"] == f"http://127.0.0.1:{web.port}/robots.txt"


def _ask_in_a_process(url: str, folder: Path) -> str:
    return fetch.fetch(url, policy(robots_folder=folder)).code


def test_processes_that_start_together_ask_once(tmp_path: Path) -> None:
    slow = [0.3, reply(200, b"User-agent: *\nDisallow: /no")]
    with site(slow).serve() as web:
        tasks = [(f"http://127.0.0.1:{web.port}/{name}", tmp_path) for name in ("no", "yes", "no", "yes")]
        with multiprocessing.get_context("forkserver").Pool(4) as pool:
            codes = pool.starmap(_ask_in_a_process, tasks, chunksize=1)
        assert codes == ["opt_out", "ok", "opt_out", "ok"]
        assert web.hits["/robots.txt"] == 1


def test_what_is_in_the_folder_ages_and_what_is_unreadable_is_asked_again(tmp_path: Path) -> None:
    with site(reply(500)).serve() as web:
        ask = {"robots_folder": tmp_path, "retries": 0}
        get(web, "/a", **ask)
        (file,) = tmp_path.rglob("*.json")
        known = json.loads(file.read_text())
        for content, asked in (
            (json.dumps(known | {"asked_at": time.time() - robots.KEEP_FAILURE_S + 60}), 0),
            (json.dumps(known | {"asked_at": time.time() - robots.KEEP_FAILURE_S - 60}), 1),
            (json.dumps({"another": "version"}), 1),
            ("no json", 1),
        ):
            file.write_text(content)
            robots.forget()
            before = web.hits["/robots.txt"]
            assert get(web, "/a", **ask).code == "opt_out"
            assert web.hits["/robots.txt"] - before == asked, content


def test_a_host_that_could_not_be_reached_is_not_written_down(tmp_path: Path) -> None:
    with site(reply(404)).serve() as web:
        url = f"http://127.0.0.1:{web.port}/a"
    assert fetch.fetch(url, policy(robots_folder=tmp_path, retries=0)).code == "connect"
    assert list(tmp_path.rglob("*.json")) == []


def test_a_folder_that_cannot_be_used_costs_questions_and_no_rows(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with site(reply(200, b"User-agent: *\nDisallow: /no")).serve() as web:
        assert get(web, "/no", robots_folder=tmp_path / "file").code == "opt_out"


def test_a_crawl_delay_spaces_the_requests_and_is_capped() -> None:
    with site(reply(200, b"User-agent: *\nCrawl-delay: 1000")).serve() as web:
        get(web, "/0")
        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            codes = list(pool.map(lambda n: get(web, f"/{n}", max_wait_s=0.1).code, range(1, 4)))
        assert codes == ["ok"] * 3
        assert time.monotonic() - started >= 0.19
        started = time.monotonic()
        for number in range(4, 7):
            get(web, f"/{number}", max_wait_s=0.1, num_processes=3)
        assert time.monotonic() - started >= 0.59


def test_without_robots_nothing_is_asked() -> None:
    with site(reply(200, b"User-agent: *\nDisallow: /")).serve() as web:
        assert get(web, "/a", robots=False).code == "ok"
        assert web.hits["/robots.txt"] == 0
