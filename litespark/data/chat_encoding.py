"""From messages to token ids, and which of them are answers.

The whole text of a conversation is tokenized at once, as at inference, and not piece by piece,
which would cut tokens otherwise.  A token is an answer's if it has a character of the answer: the
rule of `transformers`, and right where a token holds the end of the prompt and the begin of an
answer.

Control tokens come from the template alone.  A message that spells one out (`<|im_end|>`) would
become one, and could end a turn or forge another's: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from litespark.data.chat_template import ChatTemplate, Span, Turns, load_chat_template
from litespark.data.conversations import BadRow, Conversation, Message, Preference
from litespark.data.tokenizers import JsonTokenizer, Tokenizer
from litespark.errors import UserError


@dataclass(frozen=True)
class EncodedChat:
    """Token ids, and the tokens [start, stop) that are answers, in order and apart."""

    ids: list[int]
    answers: list[Span]

    @property
    def answer_tokens(self) -> int:
        """How many tokens are answers'."""
        return sum(stop - start for start, stop in self.answers)

    def truncated(self, max_tokens: int) -> EncodedChat:
        """The first `max_tokens` tokens."""
        answers = [(a, min(b, max_tokens)) for a, b in self.answers if a < max_tokens]
        return EncodedChat(self.ids[:max_tokens], answers)


class ChatEncoder:
    """Conversations and preferences of one tokenizer and template as tokens.

    Args:
        tokenizer: one with a `tokenizer.json`, whose control tokens have a text.
        template: the chat template.
        turns: train on all answers of a conversation, or on its last one.

    Raises:
        UserError: the tokenizer has no `tokenizer.json`.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, turns: Turns = "all") -> None:
        if not isinstance(tokenizer, JsonTokenizer):
            raise UserError(
                f"tokenizer {tokenizer.path}",
                "has no tokenizer.json, and chat templates write control tokens as text",
                "Name the folder of a Hugging Face tokenizer.",
            )
        self._tokenizer = tokenizer.with_control_tokens()
        self._control_tokens = tokenizer.control_tokens
        self.template = template
        self._turns: Turns = turns

    def encode_conversation(self, conversation: Conversation) -> EncodedChat:
        """One conversation.

        Raises:
            BadRow: it holds a control token, or the template refuses it.
        """
        self._refuse_control_tokens(conversation.messages)
        text, spans = self.template.render_with_answers(
            conversation.messages, conversation.tools, self._turns
        )
        return self._encoded(text, spans)

    def encode_preference(self, preference: Preference) -> tuple[EncodedChat, EncodedChat]:
        """The prompt with the chosen answer, and with the rejected one.

        Raises:
            BadRow: a message holds a control token, or the template refuses it.
        """
        halves = []
        for answer in (preference.chosen, preference.rejected):
            self._refuse_control_tokens([*preference.prompt, *answer])
            text, span = self.template.answer_span(preference.prompt, answer, preference.tools)
            halves.append(self._encoded(text, [span]))
        return halves[0], halves[1]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """What a model is given to answer: the messages and the generation prompt.

        Raises:
            BadRow: a message holds a control token, or the template refuses them.
        """
        self._refuse_control_tokens(messages)
        text = self.template.render(messages, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encoded(self, text: str, spans: Sequence[Span]) -> EncodedChat:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        starts, stops = np.array(found.offsets, dtype=np.int64).reshape(-1, 2).T
        is_answer = np.zeros(len(starts), dtype=bool)
        for start, stop in spans:
            # A token may have no character of its own (a tokenizer's dummy prefix).
            is_empty_inside = (starts == stops) & (starts >= start) & (starts < stop)
            is_answer |= ((stops > start) & (starts < stop)) | is_empty_inside
        answers = list(_runs(is_answer))
        if not answers:
            raise BadRow("no answer", "no token of the text is an answer's")
        return EncodedChat(list(found.ids), answers)

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for text in _texts(message):
                for token in self._control_tokens:
                    if token in text:
                        raise BadRow(
                            "control token in text",
                            f"a message of the role {message['role']} holds the control token "
                            f"{token!r}",
                        )


def open_encoder(
    tokenizer: Tokenizer, template_path: str | None = None, turns: Turns = "all"
) -> ChatEncoder:
    """The encoder of a tokenizer with its own chat template, or with the one that is named.

    Raises:
        UserError: there is no template, or the tokenizer has no control tokens.
    """
    control_tokens = tokenizer.control_tokens if isinstance(tokenizer, JsonTokenizer) else ()
    template = load_chat_template(tokenizer.path, control_tokens, template_path)
    return ChatEncoder(tokenizer, template, turns)


def _texts(value: Any) -> Iterator[str]:
    """All texts inside of a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _runs(flags: np.ndarray) -> Iterator[Span]:
    """[start, stop) of each run of True."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]))).tolist()
    yield from list(pairwise(borders))[::2]
