"""The report page: counts, curves, scores and a gallery, and nothing that a hostile caption could do with it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pairsmaker
import pytest
from PIL import Image

from clips_data import report, report_html, shard, tars
from clips_data.config import ReportConfig, ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> & \u202e\x00\x1b[31m \'"><b>bold'


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(caption=HOSTILE) if number == 1 else None)
    pairsmaker.write_captions(
        tmp_path,
        change=lambda number, row: (
            row.update(caption=f"First {HOSTILE}. Second {HOSTILE}.")
            if number == 1
            else number == 2 and pairsmaker.reject(row)
        ),
    )
    shard.run(ShardConfig(shard_rows=4, heldout_ratio=0.4), Job(work=tmp_path, quiet=True))
    write_run(tmp_path)
    return tmp_path


def write_run(work: Path, name: str = "default") -> None:
    folder = work / "runs" / name
    (folder / "eval").mkdir(parents=True)
    rows = [
        {"step": n, "samples": 8 * n, "loss": 9.0 / n, "contrastive_loss": 3.0 / n, "caption_loss": 3.0 / n}
        for n in range(1, 50)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 50, "sam')  # torn by a kill
    scores = {"text_to_image_r1": 0.213, "image_to_text_r1": 0.25, "chance_text_to_image_r1": 0.002, "num_images": 4}
    (folder / "eval" / "retrieval.json").write_text(json.dumps({"schema_version": 1, "scores": scores}))
    (folder / "eval" / "facts.json").write_text(
        json.dumps({"num_captions": 4, "mllm": total(0.93, 0.81), "clips": total(0.62, 0.53)})
    )
    index = json.loads((work / "shards" / "index.json").read_text())
    ours = [
        {"key": sample.key, "caption": f"ours {HOSTILE}"}
        for file in index["splits"]["heldout"]["shards"]
        for sample in tars.read_samples(work / "shards" / file["file"])
    ]
    (folder / "eval" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))


def total(precision: float, recall: float) -> dict[str, Any]:
    kinds = {"colour": {"precision": precision, "claims": 40, "recall": recall, "facts": 50}}
    return {"num_captions": 4, "precision": precision, "claims": 400, "recall": recall, "facts": 500, "kinds": kinds}


def make(work: Path, **options: Any) -> str:
    done = report.run(ReportConfig(**options), Job(work=work, quiet=True))
    return done.units[0].read_text()


def test_hostile_captions_stay_text(work: Path) -> None:
    text = make(work)
    page = Page(text)
    assert not page.open
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert page.all("script") == [{}] and text.count("<script") == 1
    assert "<b>bold" not in text
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert all((attributes["src"] or "").startswith("data:image/jpeg;base64,") for attributes in page.all("img"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text)


def test_the_page_may_load_nothing(work: Path) -> None:
    text = make(work)
    (policy,) = [m["content"] for m in Page(text).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert not re.search(r"https?://|url\(|@import", text)


def test_counts_scores_and_facts_are_shown_with_their_denominators(work: Path) -> None:
    text = make(work)
    words = re.sub(r"\s+", " ", " ".join(Page(text).words))
    assert "Pairs of image and text 10 12 83.3 % http_4xx − 2 12 16.7 %" in words
    assert "With a synthetic caption 9 10 90.0 % refused − 1 10 10.0 %" in words
    assert "Text → image 21.3 % chance 0.2 %" in words and "images: 4" in words
    assert re.search(r"colour 93\.0 % of 40 81\.0 % of 50 62\.0 % of 40 53\.0 % of 50", words)


def test_curves_are_inline_and_leave_out_a_torn_line(work: Path) -> None:
    text = make(work)
    labels = [label for attributes in Page(text).all("svg") if "over" in (label := attributes["aria-label"] or "")]
    assert labels == [
        "Total loss: from 9 to 0.184 over 49 points",
        "Contrastive loss: from 3 to 0.0612 over 49 points",
        "Captioning loss: from 3 to 0.0612 over 49 points",
    ]


def test_the_gallery_shows_captioned_samples_first_with_small_jpegs(work: Path) -> None:
    num_heldout = json.loads((work / "shards" / "index.json").read_text())["splits"]["heldout"]["num_samples"]
    text = make(work, gallery=num_heldout + 2)
    page = Page(text)
    assert len(page.all("article")) == num_heldout + 2
    assert text.count(">CLIPS captioner</dt>") == num_heldout
    assert text.rfind(">CLIPS captioner</dt>") < text.find(" · train<")
    for attributes in page.all("img"):
        data = base64.b64decode((attributes["src"] or "").partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and (str(image.width), str(image.height)) == (
                attributes["width"],
                attributes["height"],
            )
    assert len(Page(make(work, gallery=3)).all("article")) == 3


def test_sub_captions_are_marked_in_turn() -> None:
    marked = report_html.marked_caption("A <b>. B. C.", [(0, 5), (7, 8), (10, 11)])
    assert marked == '<mark class="a">A &lt;b&gt;</mark>. <mark class="b">B</mark>. <mark class="a">C</mark>.'


def test_endless_captions_are_cut() -> None:
    assert len(report_html.caption("x" * 1_000_000)) < 2000
    assert "998\u2009500 more characters" in report_html.caption("x" * 1_000_000)


def test_the_same_folder_gives_the_same_page_and_is_not_written_twice(work: Path) -> None:
    first = make(work)
    again = report.run(ReportConfig(), Job(work=work, quiet=True))
    assert (again.made, again.skipped) == (0, 1) and again.units[0].read_text() == first


def test_a_page_without_training_and_an_undecodable_image(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(image=b"\xff\xd8 no image <b>"))
    pairsmaker.write_captions(tmp_path)
    shard.run(ShardConfig(), Job(work=tmp_path, quiet=True))
    text = make(tmp_path)
    assert "This run has no metrics yet." in text and "This image cannot be decoded" in text


def test_a_wrong_run_or_an_empty_folder_is_clear(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no run 'defualt' .* Did you mean 'default'"):
        make(work, name="defualt")
    with pytest.raises(UserError, match="no finished work to report on"):
        make(tmp_path / "empty")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (0.06, 3, [0, 1, 2, 3]),
        (5, 5, [4.5, 4.75, 5, 5.25, 5.5]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert report_html.ticks(low, high) == expected


def test_each_set_of_queries_is_named_and_shown_once(work: Path) -> None:
    def scores(recall: float) -> dict[str, float]:
        ways = ("text_to_image", "image_to_text")
        return {f"{way}_r{k}": recall for way in ways for k in (1, 5, 10)} | {"num_images": 8, "num_texts": 40}

    eval_folder = work / "runs" / "default" / "eval"
    for path in eval_folder.glob("*.json"):
        path.unlink()
    found = {"captions": scores(0.25), "dense": scores(0.75)}
    (eval_folder / "eval.json").write_text(json.dumps({"retrieval": found["captions"], "retrieval_by_queries": found}))
    page = make(work)
    assert page.count("queries: captions, images: 8, texts: 40") == page.count("queries: dense, images: 8") == 1
    assert "text → image R@1, queries: dense" in page
