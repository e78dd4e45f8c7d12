"""What a user can choose, per stage. Python holds the defaults, manifests and options hold choices.

Every field becomes an option of its command and a key of a manifest, with the description as its help. Frozen, and
unknown keys are refused; the resolved config is saved with every output.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field, field_validator


class StageConfig(BaseModel):
    """Base of the stages' configs."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Share = Annotated[float, Field(ge=0, le=1)]
Line = NewType("Line", str)
"""A text that may hold commas. A list of them is given one at a time, by repeating the option."""


class DownloadConfig(StageConfig):
    """``clips download``: a URL list becomes ``pairs/``."""

    source: str = Field(
        description="URL list: a file or folder (parquet, csv, tsv, jsonl, txt, also .gz and .zst), an fsspec URL, "
        "- for stdin, or 'demo' for the built-in demo world."
    )
    adapter: str = Field(
        "auto", description="Published set whose columns the list has, 'auto' to tell it by its columns, or none."
    )
    url_column: str = Field(
        "auto", description="Column of the list that holds the URL; auto takes the adapter's or url."
    )
    caption_column: str | None = Field(
        "auto",
        description="Column that holds the web caption; auto takes the adapter's or caption; none for URL-only lists. "
        "The demo's list has caption and, true in all it says, description.",
    )
    verify_hash: str | None = Field(
        None, description="Column with the md5, sha1 or sha256 (hex) that the downloaded bytes must have."
    )
    dedup: Literal["none", "url", "sha256", "phash"] = Field(
        "none",
        description="What counts as a duplicate: url skips later rows of the list, sha256 and phash mark later images.",
    )
    max_list_bytes: int = Field(
        1 << 36, gt=0, description="Largest list in bytes after decompression; guards against compression bombs."
    )
    num_pairs: int = Field(2500, gt=0, description="Demo only: number of URLs in the demo's list.")
    world: int = Field(0, ge=0, description="Demo only: number of the demo world, which seeds its scenes.")
    shard_rows: int = Field(1000, gt=0, le=10_000, description="URLs per shard, successful or not.")
    threads: int = Field(16, gt=0, description="Concurrent requests per worker process.")
    timeout_s: float = Field(
        20.0, gt=0, description="Total seconds for one image, redirects included, waits before retries excluded."
    )
    retries: int = Field(
        2, ge=0, description="Further attempts where one can help: dns, connect, timeout, 429 and 5xx."
    )
    max_wait_s: float = Field(
        10.0, gt=0, description="Longest wait in seconds before a retry, also when the server asks for more."
    )
    host_connections: int = Field(
        16, gt=0, description="Connections to one host at a time, over all processes and slices together."
    )
    host_rate: float = Field(
        0.0, ge=0, description="Requests per second to one host, over all processes and slices together; 0 sets no cap."
    )
    robots: bool = Field(False, description="Fetch each host's robots.txt first and honour it.")
    honour_opt_out: bool = Field(
        True, description="Honour X-Robots-Tag noai, noimageai, noindex, noimageindex and tdm-reservation."
    )
    user_agent: str = Field(
        "clips",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="Token that the User-Agent header starts with; X-Robots-Tag and robots.txt may address it.",
    )
    dns_servers: tuple[str, ...] = Field(
        (), description="Addresses of DNS resolvers to ask in turn, with or without :port; none asks the system's."
    )
    allow_network: tuple[str, ...] = Field(
        (), description="CIDR blocks of non-public addresses that may be dialled all the same."
    )
    env_proxy: bool = Field(
        False, description="Use http_proxy and https_proxy of the environment; the proxy then resolves the hosts."
    )
    max_image_bytes: int = Field(20_000_000, gt=0, description="Largest body in bytes that is read.")
    max_pixels: int = Field(
        100_000_000, gt=0, description="Largest image in pixels, by its header, before any decoding."
    )
    resize: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = Field(
        "no",
        description="no keeps the bytes of JPEG, PNG and WebP; keep_ratio makes the shorter side image_px, "
        "keep_ratio_largest the longer one, center_crop and border a square.",
    )
    image_px: int = Field(256, gt=0, description="Side in pixels that resize aims at.")
    only_if_bigger: bool = Field(False, description="Never enlarge: images smaller than image_px keep their size.")
    encode: Literal["jpg", "png", "webp"] = Field("jpg", description="Format of images that are encoded again.")
    encode_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP that are encoded again.")
    min_success: Share = Field(0.5, description="Least share of URLs that must succeed; below it the exit code is 3.")


class RecaptionConfig(StageConfig):
    """``clips recaption``: pairs become a caption column."""

    column: str = Field("synthetic", pattern=r"^[a-z][a-z0-9_]*$", description="Name of the column to make.")
    prompt: str = Field("describe", description="Prompt file: a path, or the name of a packaged one.")
    model: str = Field(
        "demo",
        description="Captioner: a folder or hub name, a run of ours, a name that the endpoint serves, or 'demo' for "
        "the packaged one.",
    )
    model_revision: str | None = Field(None, description="Revision of a hub model; none takes the default branch.")
    engine: Literal["auto", "vllm", "endpoint", "hf", "clips"] = Field(
        "auto",
        description="What runs the captioner: vllm here, an OpenAI-compatible endpoint, hf (transformers), or clips (a "
        "run of ours); auto takes what the model and this machine ask for, and says so.",
    )
    endpoint: str | None = Field(
        None, description="Base URL of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1."
    )
    endpoint_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the endpoint's API key."
    )
    concurrency: int = Field(64, gt=0, description="Requests in flight to the endpoint.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Read it first.")
    scores: str = Field("clip", description="Name of the scores that a prompt's conflict gate looks at.")
    gate_min: float | None = Field(
        None, description="Least score at which a web caption is fused; none takes the prompt's own."
    )
    reuse: tuple[str, ...] = Field(
        (), description="Folders of finished caption columns whose answers to the same requests are taken over."
    )
    seed: int = Field(0, ge=0, description="Seeds each row's sampling, together with its key.")
    batch_rows: int = Field(
        256,
        gt=0,
        description="Rows that the engine works on at a time, and per journalled batch: what a kill can lose.",
    )
    max_model_tokens: int = Field(
        0, ge=0, description="Longest prompt plus caption in tokens; 0 takes the model's own limit."
    )
    gpu_memory_share: Share = Field(0.9, description="Share of the GPU's memory for vLLM.")
    cpu_cache_gib: int = Field(
        1, gt=0, description="GiB of main memory for vLLM's key-value cache where there is no GPU."
    )
    batch_deadline_s: float = Field(
        600.0, gt=0, description="Seconds after which a batch without answer counts as a dead engine."
    )
    min_success: Share = Field(
        0.95, description="Least share of rows that must get a caption; below it the exit code is 3."
    )


class ScoreConfig(StageConfig):
    """``clips score``: image-text similarity of each column, from a CLIP checkpoint."""

    name: str = Field("clip", pattern=r"^[a-z][a-z0-9_]*$", description="Name of the scores' folder.")
    model: str = Field(
        "demo",
        description="open_clip name, hf-hub: or local-dir: path, the folder of a run of yours, or 'demo' for the "
        "packaged small one.",
    )
    pretrained: str | None = Field(None, description="Pretrained tag of an open_clip name.")
    columns: tuple[str, ...] = Field(("web", "synthetic"), description="Caption columns to score.")
    batch: int = Field(64, gt=0, description="Images per forward pass.")
    sentences: bool = Field(False, description="Also score each sentence: the lowest of a caption, and all of them.")
    support: int = Field(
        0,
        ge=0,
        description="Also tell how far a caption's least supported word is said, beyond chance, by this many captions "
        "of other images that fit its image best; 0 leaves it out.",
    )
    near_duplicates: bool = Field(False, description="Also tell captions that nearly repeat an earlier one.")
    labels: str | None = Field(
        None,
        description="Table (parquet, csv, tsv, jsonl) with what another model says of the images; its columns become "
        "the scores, and no model is loaded.",
    )
    label_key: Literal["key", "sha256", "url"] = Field("key", description="Column by which labels are joined.")


class ShardConfig(StageConfig):
    """``clips shard``: pairs, columns and scores become training data."""

    columns: tuple[str, ...] = Field(
        ("web", "synthetic"), description="Caption columns to write; the first is the web caption."
    )
    split: Literal["period", "sentence", "authors"] = Field(
        "period", description="Rule that cuts a caption into sub-captions."
    )
    scores: tuple[str, ...] = Field(
        ("clip",), description="Names of the scores to carry along; the first is what `score` means in expressions."
    )
    where: tuple[Line, ...] = Field(
        (), description="Polars SQL expression that a sample must meet, such as 'pairs.width >= 200'; may be repeated."
    )
    exclude: str | None = Field(
        None,
        description="File with samples to leave out, before all other filters: the list that a report's gallery hands "
        "out, or one key or image sha256 a line.",
    )
    keep_top: Share | None = Field(None, description="Share of the samples to keep, those highest in `by`.")
    by: str = Field("score.web", description="Number that keep_top goes by: a polars SQL expression.")
    balance: str | None = Field(
        None,
        description="File with one concept a line; captions without any go, those of frequent ones are thinned. 'demo' "
        "is the packaged list for the demo world.",
    )
    balance_column: str = Field("web", description="Caption column in which concepts are looked for.")
    balance_cap: int = Field(20_000, gt=0, description="Samples that a concept is thinned to, about.")
    web_ratio: Share = Field(0.8, description="Share of samples whose materialised .txt is the web caption.")
    replace_below: float | None = Field(
        None, description="Web captions whose score is below this give way to the second column in the mix."
    )
    mix: tuple[Line, ...] = Field(
        (),
        description="Rules in place of web_ratio: weights (web=0.8,synthetic=0.2), perhaps after a condition "
        "(epoch>=10: …, score.web<0.25: …); the last whose condition holds counts. May be repeated.",
    )
    seed: int = Field(0, ge=0, description="Seeds the mix, the shuffle, the held-out split and the balancing.")
    heldout_ratio: Share = Field(0.0, description="Share of images held out for evaluation, by image sha256.")
    heldout_max: int = Field(0, ge=0, description="Largest number of held-out samples; 0 sets no limit.")
    shard_rows: int = Field(1000, gt=0, description="Samples per tar.")
    shard_bytes: int = Field(
        0, ge=0, description="Bytes of images and captions at which a tar is full before shard_rows; 0 sets no limit."
    )
    licence: str = Field(
        "unknown",
        pattern=r"^\S[^\r\n]*$",
        description="Licence that the dataset card names in one line, as Hugging Face spells it.",
    )
    explain: int = Field(0, ge=0, description="Removed samples to show for each filter.")

    @field_validator("scores", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """Shards made before several scores could be carried say one name or none."""
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value


class ReportConfig(StageConfig):
    """``clips report``: one static HTML page about a work folder."""

    name: str = Field("default", description="Name of the run under runs/ whose curves and scores are shown.")
    gallery: int = Field(24, ge=0, description="Number of samples shown with image and captions.")
    seed: int = Field(0, ge=0, description="Draws the samples of the gallery.")
