"""The report page in a real browser: what it says it may do, what a click does, and that nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pairsmaker
import pytest
from test_data_report import HOSTILE, make, write_run

from clips_data import shard, tars
from clips_data.config import ShardConfig
from clips_data.executor import Job

ATTACK = f"{HOSTILE}</script><script>document.title='taken'</script><svg onload=\"document.title='taken'\">"
BUTTON = "document.querySelector('article[data-key=\"{key}\"] button[value={mark}]').click()"
PRESSED = "[...document.querySelectorAll('button[aria-pressed=true]')].map(one => one.value)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.opened(tmp_path_factory.mktemp("browser") / "chromium") as tab:
        yield tab


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose captions attack the page, one of them with 100 kB."""
    work = tmp_path_factory.mktemp("work")
    pairsmaker.write_pairs(work, change=lambda number, row: row.update(caption=ATTACK * (1 + 1000 * (number == 1))))
    pairsmaker.write_captions(work, change=lambda number, row: row.update(caption=f"One {ATTACK}. Two {ATTACK}."))
    shard.run(ShardConfig(heldout_ratio=0.4, where=("key != '000000004'",)), Job(work=work, quiet=True))
    write_run(work)
    return work


def keys(work: Path) -> set[str]:
    files = sorted((work / "shards").glob("*.tar"))
    return {sample.key for file in files for sample in tars.read_samples(file)}


def opened(tab: browser.Tab, work: Path, **look: object) -> list[str]:
    """Opens the work folder's page and returns the keys of its cards."""
    make(work)
    tab.look(**look)  # type: ignore[arg-type]
    tab.messages.clear()
    tab.requests.clear()
    tab.open(work / "runs" / "default" / "report.html")
    shown = tab.ask("[...document.querySelectorAll('article[data-key]')].map(one => one.dataset.key)")
    assert shown
    return list(shown)


def test_attacks_in_captions_are_text_and_nothing_is_loaded(tab: browser.Tab, work: Path) -> None:
    opened(tab, work)
    assert tab.ask("document.title") == "clips report: default"
    assert tab.ask("document.scripts.length") == 1
    assert tab.ask("document.querySelectorAll('svg[onload], img[onerror], article b').length") == 0
    assert "<script>alert(1)</script>" in tab.ask("document.querySelector('.gallery article dd').innerText")
    assert {address.partition(":")[0] for address in tab.requests} == {"file", "data"}
    assert sum(address.startswith("file:") for address in tab.requests) == 1
    assert tab.messages == []


def test_the_policy_stops_a_script_that_got_in(tab: browser.Tab, work: Path) -> None:
    opened(tab, work)
    tab.ask("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert tab.ask("document.title") == "clips report: default"
    assert any("Content Security Policy" in message for message in tab.messages)


def test_marks_are_kept_counted_and_taken_back(tab: browser.Tab, work: Path) -> None:
    first, second, *_ = opened(tab, work)
    assert tab.ask("document.getElementById('marks').innerText").startswith("0 flagged, 0 kept")
    assert tab.ask("[...document.querySelectorAll('#marks button')].every(one => one.disabled)")
    for key, mark in ((first, "flag"), (second, "keep"), (first, "keep"), (first, "flag")):
        tab.ask(BUTTON.format(key=key, mark=mark))
    assert tab.ask("document.querySelector('#marks output').value") == "1 flagged, 1 kept"
    assert sorted(tab.ask(PRESSED)) == ["flag", "keep"]
    tab.ask(BUTTON.format(key=first, mark="flag"))
    assert tab.ask(PRESSED) == ["keep"]
    tab.ask("document.querySelectorAll('#marks button')[1].click()")
    assert tab.ask(PRESSED) == [] and tab.ask("document.querySelector('#marks output').value") == "0 flagged, 0 kept"


def test_the_downloaded_list_takes_the_flagged_samples_out_of_the_shards(tab: browser.Tab, work: Path) -> None:
    first, second, third, *_ = opened(tab, work)
    before = keys(work)
    for key, mark in ((first, "flag"), (second, "keep"), (third, "flag")):
        tab.ask(BUTTON.format(key=key, mark=mark))
    tab.ask("document.querySelector('#marks button').click()")
    path = tab.downloaded("marks-default.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["key"], row["mark"]) for row in rows] == [(first, "flag"), (second, "keep"), (third, "flag")]
    assert all(len(row["sha256"]) == 64 for row in rows) and tab.messages == []
    out = work / "excluded"
    config = ShardConfig(heldout_ratio=0.4, where=("key != '000000004'",), exclude=str(path))
    report = shard.run(config, Job(work=work, out=out, quiet=True))
    left = {sample.key for file in out.glob("*.tar") for sample in tars.read_samples(file)}
    assert before - left == {first, third} and left < before
    assert report.facts["exclude"] == "2 samples listed, 0 of them unknown"


def test_without_javascript_the_page_reads_and_has_no_dead_buttons(tab: browser.Tab, work: Path) -> None:
    try:
        opened(tab, work, script=False)
        assert not tab.ask("document.getElementById('marks').offsetHeight")
        assert tab.ask("document.querySelectorAll('article button').length") == 0
        assert "Marking needs JavaScript" in tab.ask("document.body.innerText")
    finally:
        tab.look()


@pytest.mark.parametrize("width_px", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_window_in_both_colours(tab: browser.Tab, work: Path, width_px: int, dark: bool) -> None:
    opened(tab, work, width_px=width_px, dark=dark)
    assert tab.ask("document.documentElement.scrollWidth") <= width_px
    red, green, blue = tab.ask("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(red, green, blue) < 60) == dark
