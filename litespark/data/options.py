"""What a preprocessing job is asked to do, and the totals it reports while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from litespark.data.documents import BadLine


@dataclass(frozen=True)
class PreprocessOptions:
    """What `litespark preprocess` is asked to do.

    Attributes:
        inputs: files, folders and globs.
        tokenizer: see `litespark.data.tokenizers.load_tokenizer`.
        output_prefix: a shard is `<output_prefix>[_<subset>]_<json_key>_document`.
        json_keys: the keys of the texts in each object, one shard (or set of shards) each.
        split_by: dotted path of the sub-source's name; one shard a sub-source.
        workers: tokenizing processes.
        append_eod: end each document that is not empty with the tokenizer's end-of-text id.
        prepend_bos: begin each document that is not empty with the begin-of-text id.
        on_error: what a line without a document does: end the job, or be listed and skipped.
        max_errors: most lines to skip before the job ends all the same.
        overwrite: replace an existing shard.
        resume: go on with the unfinished work of a job that was asked the same.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    split_by: str | None = None
    workers: int = 1
    append_eod: bool = True
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: int = 100
    overwrite: bool = False
    resume: bool = False

    def shard_prefix(self, json_key: str, subset: str = "") -> str:
        """The prefix of the files of one shard."""
        part = f"_{subset}" if subset else ""
        return f"{self.output_prefix}{part}_{json_key}_document"

    @property
    def columns(self) -> tuple[str, ...]:
        """What is needed of an input that has columns."""
        more = () if self.split_by is None else (self.split_by.split(".")[0],)
        return tuple(dict.fromkeys((*self.json_keys, *more)))

    @property
    def quarantine_path(self) -> Path:
        """Where skipped lines are listed, when there are any."""
        return Path(f"{self.output_prefix}_quarantine.txt")


@dataclass
class Progress:
    """Running totals; text is counted in UTF-8 bytes, `bad_lines` holds the first few skipped.

    `read_bytes` of `total_bytes` of the files themselves have been read.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    replaced_surrogates: int = 0
    skipped_bad_lines: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    files_begun: int = 0
    files_total: int = 0
    read_bytes: int = 0
    total_bytes: int = 0
    resumed_documents: int = 0
    seconds: float = 0.0
