"""Published sets: which of their columns hold the URL, the web caption, the identity, and captions that come along.

A set is told by its columns. One with URLs is a list to download, and its captions become caption columns afterwards;
one without is a table to join to pairs that are already there, by the identity that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from clips_data.errors import UsageError, UserError, did_you_mean

AUTO: Final = "auto"
NONE: Final = "none"


@dataclass(frozen=True)
class Adapter:
    """The columns of one published set, by the names that its files have.

    ``url`` and ``caption`` list the names that its releases use; the first that a list has counts. ``signature`` are
    the columns by which the set is told. ``captions`` maps names of caption columns to columns of the set (``/`` leads
    into nested values). ``headerless`` names the columns of files without a header. ``joins_by`` marks a set without
    URLs and says by which column of the pairs it is joined, ``table_key`` what that is called in the set.
    """

    name: str
    signature: frozenset[str] = frozenset()
    url: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    id: str | None = None
    hash: str | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] | None = None
    joins_by: Literal["uid", "url", "sha256"] | None = None
    table_key: str | None = None

    def key_for(self, by: str) -> str:
        """What the set calls the identity that pairs are joined by."""
        if by == self.joins_by and self.table_key is not None:
            return self.table_key
        return {"url": self.url[0] if self.url else by, "sha256": self.hash or by}.get(by, by)


def _columns(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DREAMLIP = {
    f"{length}_{short}": f"{length}{name}_captions"
    for short, name in (("instructblip", "IB"), ("sharegpt4v", "SV"), ("llava", "LLA"))
    for length in ("short", "long")
}

# Each entry says where its column names were read; what could not be confirmed is said too.
ADAPTERS: Final = (
    # The dataset viewers of mlfoundations/datacomp_pools and gabrielilharco/datanet_alpha. sha256 is that of the bytes
    # that the URL answered with.
    Adapter(
        "datacomp",
        _columns("uid url text sha256"),
        url=("url",),
        caption=("text",),
        id="uid",
        hash="sha256",
    ),
    # The dataset card's ``dataset_info``; the second recaptioning is a column that only later files have, as its users'
    # scripts and the viewer's cast error say.
    Adapter(
        "recap-datacomp-1b",
        _columns("url re_caption org_caption sha256"),
        url=("url",),
        caption=("org_caption",),
        id="key",
        hash="sha256",
        captions={"recap": "re_caption", "recap_v2": "re_caption_condition_diverse_topk"},
    ),
    # img2dataset's dataset_examples/cc3m.md and cc12m.md: tab-separated, without a header, without quoting.
    Adapter("cc3m", url=("url",), caption=("caption",), headerless=("caption", "url")),
    Adapter("cc12m", url=("url",), caption=("caption",), headerless=("url", "caption")),
    # img2dataset's dataset_examples/laion400m.md and laion5B.md, and the dataset_infos of subsets of both: LAION-400M
    # and the first LAION-5B have SAMPLE_ID, LICENSE and NSFW, the joined ones hash, punsafe and pwatermark.
    Adapter("laion", _columns("URL TEXT similarity"), url=("URL",), caption=("TEXT",), id="SAMPLE_ID"),
    # The preview in COYO's README.
    Adapter(
        "coyo",
        _columns("id url text image_phash clip_similarity_vitb32"),
        url=("url",),
        caption=("text",),
        id="id",
    ),
    # The names of the captions are in FLAIR's and DreamLIP's own loaders; "Image Path" for the URL in users' commands
    # for the files of CC12M and YFCC15M. That the file of CC3M has it too was not confirmed, hence the second name.
    Adapter(
        "dreamlip",
        _columns("raw_caption shortIB_captions longIB_captions longSV_captions longLLA_captions"),
        url=("Image Path", "url"),
        caption=("raw_caption",),
        captions=_DREAMLIP,
    ),
    # The dataset card's list of columns. ``key`` and ``status`` are the set's own.
    Adapter(
        "pixelprose",
        _columns("uid url original_caption vlm_model vlm_caption"),
        url=("url",),
        caption=("original_caption",),
        id="uid",
        captions={"pixelprose": "vlm_caption"},
    ),
    # The snippet in CapsFusion's README.
    Adapter(
        "capsfusion",
        _columns("image_url laion_2b laion_coco capsfusion"),
        url=("image_url",),
        caption=("laion_2b",),
        captions={"capsfusion": "capsfusion", "laion_coco": "laion_coco"},
    ),
    # Users' loaders read url, caption and cogvlm_caption; the full list of columns was not confirmed. Its ``caption``
    # is the synthetic one, and no alt-text comes with it.
    Adapter(
        "kale",
        _columns("url caption cogvlm_caption"),
        url=("url",),
        captions={"kale": "caption", "kale_cogvlm": "cogvlm_caption"},
    ),
    # The dataset card's ``dataset_info``: webdataset tars whose json member holds uid and sha256, syn.json captions.
    Adapter(
        "datacompdr",
        _columns("url.txt syn.json json"),
        captions={f"coca_{number}": f"syn.json/syn_text/{number}" for number in range(5)},
        joins_by="uid",
        table_key="json/uid",
    ),
    # HQ-CLIP's README: JSON by DFN uid. The names of its fields were not confirmed, so none is written down here.
    Adapter("vlm-150m", joins_by="uid", table_key="uid"),
)
_BY_NAME: Final = {adapter.name: adapter for adapter in ADAPTERS}


def named(name: str) -> Adapter | None:
    """The adapter of this name; ``None`` for ``auto`` and ``none``."""
    if name in (AUTO, NONE):
        return None
    if name not in _BY_NAME:
        raise UsageError(f"There is no adapter {name!r}. {did_you_mean(name, [AUTO, NONE, *_BY_NAME])}")
    return _BY_NAME[name]


def recognise(columns: Sequence[str]) -> Adapter | None:
    """The set that has these columns; of several, the one that is told by most of them."""
    matching = [adapter for adapter in ADAPTERS if adapter.signature and adapter.signature <= set(columns)]
    return max(matching, key=lambda adapter: len(adapter.signature), default=None)


def recognise_headerless(first_line: Sequence[str]) -> Adapter | None:
    """The set whose files begin like this, without a header: two fields of which just one is a URL."""
    places = tuple("url" if field.startswith(("http://", "https://")) else "caption" for field in first_line)
    return next((adapter for adapter in ADAPTERS if adapter.headerless == places), None)


def check_is_list(adapter: Adapter, source: str) -> None:
    """Refuses sets that hold no URLs, and says what they are good for."""
    if adapter.joins_by is None:
        return
    key = f" --table-key {adapter.table_key}" if adapter.table_key != adapter.joins_by else ""
    raise UserError(
        f"{source} is a table of the set {adapter.name}, which holds no URLs to download. Its captions can be joined "
        f"to pairs that are there: `clips adopt {source} --captions COLUMN --as NAME --by {adapter.joins_by}{key}`."
    )
