"""What runs in an encoding process: a block of lines in, token ids and answers out.

The process-wide encoder is set once; a process belongs to one job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from litespark.data.chat_encoding import ChatEncoder, EncodedChat, open_encoder
from litespark.data.chat_template import Turns
from litespark.data.conversations import BadRow, Reason, conversation_of, preference_of
from litespark.data.documents import numbered_lines
from litespark.data.readers import LineBlock
from litespark.data.tokenizers import load_tokenizer
from litespark.utils.processes import prepare_worker


@dataclass(frozen=True)
class Settings:
    """What a process needs to know; see `litespark.data.chat_job.ChatOptions`."""

    task: Literal["sft", "dpo"]
    tokenizer: str
    chat_template: str | None
    turns: Turns
    max_tokens: int | None
    over_long: Literal["drop", "truncate"]


@dataclass(frozen=True)
class EncodedRow:
    """A conversation, or the two halves of a pair."""

    chats: tuple[EncodedChat, ...]
    is_truncated: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A row that gives nothing, and why."""

    reason: Reason
    problem: str


Outcome = EncodedRow | LeftOut


_settings: Settings
_encoder: ChatEncoder


def load(settings: Settings) -> ChatEncoder:
    """The tokenizer's template and encoder.

    Raises:
        UserError: either cannot be read.
    """
    return open_encoder(load_tokenizer(settings.tokenizer), settings.chat_template, settings.turns)


def initialize(settings: Settings) -> None:
    """Load what `encode_block` works with."""
    global _settings, _encoder
    _settings, _encoder = settings, load(settings)


def initialize_process(settings: Settings) -> None:
    """The same in a process of its own."""
    prepare_worker()
    initialize(settings)


def encode_block(block: LineBlock) -> list[tuple[int, Outcome]]:
    """The number of each line that is not empty, and what became of it."""
    return [(line, encode_line(raw)) for line, raw in numbered_lines(block)]


def encode_line(raw: bytes) -> Outcome:
    """One row as tokens, or why not."""
    import orjson

    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return LeftOut("not JSON", f"the line is not valid JSON ({error})")
    try:
        if _settings.task == "sft":
            chats = (_encoder.encode_conversation(conversation_of(row)),)
        else:
            chats = _encoder.encode_preference(preference_of(row))
    except BadRow as bad:
        return LeftOut(bad.reason, bad.problem)
    return _within_limit(chats)


def _within_limit(chats: tuple[EncodedChat, ...]) -> Outcome:
    limit, length = _settings.max_tokens, sum(len(chat.ids) for chat in chats)
    if limit is None or length <= limit:
        return EncodedRow(chats)
    if _settings.over_long == "truncate":
        (chat,) = chats
        cut = chat.truncated(limit)
        if cut.answers:
            return EncodedRow((cut,), is_truncated=True)
    return LeftOut("over-long", f"it has {length} tokens, more than --max-length {limit}")
