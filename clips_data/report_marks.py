"""Marking samples on the report page: keep, flag, and a list of the marks to download for ``clips shard --exclude``.

The page's only script. Its policy names it by its hash, so that nothing else on the page can run, whatever a caption
says. It makes the buttons itself: without it, the page has none.
"""

from __future__ import annotations

import re
from typing import Final

from clips_data import report_html as h

SCRIPT: Final = """
(() => {
  "use strict";
  const marks = new Map();
  const cards = [...document.querySelectorAll("article[data-key]")];
  const bar = document.getElementById("marks");
  if (!bar) return;
  const [count, save, clear] = bar.querySelectorAll("output, button");
  const number = (mark) => [...marks.values()].filter((one) => one.mark === mark).length;

  function show() {
    for (const card of cards) {
      const mark = marks.get(card.dataset.key)?.mark ?? "";
      card.dataset.mark = mark;
      for (const button of card.querySelectorAll(".choice button")) {
        button.setAttribute("aria-pressed", String(button.value === mark));
      }
    }
    count.textContent = `${number("flag")} flagged, ${number("keep")} kept`;
    save.disabled = clear.disabled = marks.size === 0;
  }

  function toggle(card, mark) {
    const { key, sha256 } = card.dataset;
    if (marks.get(key)?.mark === mark) marks.delete(key);
    else marks.set(key, { key, sha256, mark });
    show();
  }

  for (const card of cards) {
    const choice = document.createElement("div");
    choice.className = "choice";
    for (const mark of ["keep", "flag"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.value = mark;
      button.textContent = mark[0].toUpperCase() + mark.slice(1);
      button.addEventListener("click", () => toggle(card, mark));
      choice.append(button);
    }
    card.append(choice);
  }
  save.addEventListener("click", () => {
    const lines = [...marks.values()].map((one) => JSON.stringify(one) + "\\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
    link.download = bar.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
  clear.addEventListener("click", () => {
    marks.clear();
    show();
  });
  bar.hidden = false;
  show();
})();
"""
STYLE: Final = """
.marks { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px;
  margin: 20px -20px 0; padding: 10px 20px; background: var(--page); border-top: 1px solid var(--line); z-index: 1; }
.marks[hidden] { display: none; }
.marking { margin: 18px 0 0; max-width: none; }
 .marks output { margin-right: auto; font-variant-numeric: tabular-nums; }
button { font: inherit; font-size: .88rem; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: 6px 14px; cursor: pointer; }
button:hover:enabled { border-color: var(--accent); } button:disabled { color: var(--soft); cursor: default; }
.choice { display: flex; gap: 8px; padding: 0 14px 14px; margin-top: auto; } .choice button { flex: 1; }
button[aria-pressed="true"] { background: var(--accent); border-color: var(--accent); color: var(--page); }
button[value="flag"][aria-pressed="true"] { background: var(--bad); border-color: var(--bad); }
article[data-mark="flag"] { border-color: var(--bad); } article[data-mark="keep"] { border-color: var(--accent); }
"""


def around(cards: str, run: str) -> str:
    """A section of cards with what marking them is for, and below them the counter and the buttons of the list."""
    if not cards:
        return ""
    file = h.text(file_name(run))
    return (
        f'<section>{cards}<p class="soft marking">Flag what should not be trained on, download the list, and leave it '
        f"out with <code>clips shard --exclude {file}</code>.</p>"
        '<noscript><p class="soft">Marking needs JavaScript; nothing else on this page does.</p></noscript>'
        f'<div class="marks" id="marks" data-file="{file}" hidden><output></output>'
        '<button type="button">Download list</button><button type="button">Clear</button></div></section>'
    )


def file_name(run: str) -> str:
    return f"marks-{re.sub(r'[^A-Za-z0-9._-]+', '-', run)}.jsonl"
