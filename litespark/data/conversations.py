"""Rows of instruction and preference sets as messages, and what is wrong with those that are none.

Four habits of writing a conversation down are read, told apart by their keys:

    OpenAI      {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    ShareGPT    {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
    Alpaca      {"instruction": "...", "input": "...", "output": "...", "system": "..."}
    prompt      {"prompt": "..." or messages, "completion": "..." or messages}

and for preferences the same with `chosen` and `rejected` (texts or messages) in place of the
answer: beside `prompt`, `messages`, `conversations` or `instruction`, or alone, when both hold
whole conversations that begin alike.

A message is a dictionary as chat templates take it: `role`, `content`, and what else the row says
of it (`tool_calls`, `name`, `reasoning_content`).  Nothing is repaired: a row without a role, with
an empty answer or with a number for a text is refused with a reason that can be counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from litespark.data.documents import kind_of

Message = dict[str, Any]

Reason = Literal[
    "not JSON",
    "not an object",
    "unknown layout",
    "not a list of messages",
    "missing role",
    "unknown role",
    "not a string",
    "no answer",
    "empty answer",
    "chosen equals rejected",
    "different prompts",
    "control token in text",
    "template refused",
    "template rewrites earlier turns",
    "over-long",
]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MAX_SHOWN = 60


class BadRow(Exception):
    """A row that gives nothing to train on: `reason` is one of few, `problem` tells of the row."""

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason: Reason = reason
        self.problem = problem


@dataclass(frozen=True)
class Conversation:
    """Messages of which at least one is the assistant's, and the tools that the row offers."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt; each answer is one message of the assistant or several turns."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


def conversation_of(row: object) -> Conversation:
    """The conversation of one row.

    Raises:
        BadRow: the row is none.
    """
    fields = _object(row)
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages")
    elif "conversations" in fields:
        messages = _with_system(fields, _messages(fields["conversations"], "conversations"))
    elif "instruction" in fields:
        answer = _answer(fields.get("output"), "output")
        messages = [*_alpaca_prompt(fields), *answer]
    elif "prompt" in fields and "completion" in fields:
        messages = [*_prompt(fields["prompt"]), *_answer(fields["completion"], "completion")]
    else:
        raise _unknown(fields, "messages, conversations, instruction, or prompt and completion")
    _check_answers(messages)
    return Conversation(messages, _tools(fields))


def preference_of(row: object) -> Preference:
    """The prompt and the two answers of one row.

    Raises:
        BadRow: the row is none.
    """
    fields = _object(row)
    if "chosen" not in fields or "rejected" not in fields:
        raise _unknown(fields, "chosen and rejected")
    chosen, rejected = (_answer(fields[key], key) for key in ("chosen", "rejected"))
    if "prompt" in fields:
        prompt = _prompt(fields["prompt"])
    elif "messages" in fields:
        prompt = _messages(fields["messages"], "messages")
    elif "conversations" in fields:
        prompt = _with_system(fields, _messages(fields["conversations"], "conversations"))
    elif "instruction" in fields:
        prompt = _alpaca_prompt(fields)
    else:
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "chosen and rejected are the same")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answers(answer, name)
    return Preference(prompt, chosen, rejected, _tools(fields))


def _object(row: object) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadRow("not an object", f"the line is {kind_of(row)}, not an object")
    return row


def _unknown(fields: Mapping[str, Any], wanted: str) -> BadRow:
    keys = ", ".join(repr(key) for key in list(fields)[:8]) or "none"
    return BadRow("unknown layout", f"the row has none of {wanted} (its keys: {keys})")


def _messages(value: object, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(
            "not a list of messages", f"{key!r} is {kind_of(value)}, not a list of messages"
        )
    return [_message(item, f"{key}[{number}]") for number, item in enumerate(value)]


def _message(item: object, where: str) -> Message:
    """One message of either habit."""
    if not isinstance(item, dict):
        raise BadRow("not a list of messages", f"{where} is {kind_of(item)}, not a message")
    is_sharegpt = "from" in item and "role" not in item
    role_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = item.get(role_key)
    if role is None or role == "":
        raise BadRow("missing role", f"{where} has no {role_key!r}")
    known = _SHAREGPT_ROLES.get(role) if isinstance(role, str) and is_sharegpt else role
    if known not in _ROLES:
        shown = str(role)[:_MAX_SHOWN]
        raise BadRow("unknown role", f"{where} has the role {shown!r}, which is none of a chat's")
    content = item.get(text_key)
    calls_tools = known == "assistant" and bool(item.get("tool_calls"))
    if content is None and calls_tools:
        content = ""
    rest = {key: value for key, value in item.items() if key not in (role_key, text_key)}
    return {"role": known, "content": _text(content, f"{where}.{text_key}"), **rest}


def _text(content: object, where: str) -> str:
    """A text, also one in OpenAI's parts."""
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
        raise BadRow("not a string", f"{where} has a part that is no text")
    if not isinstance(content, str):
        raise BadRow("not a string", f"{where} is {kind_of(content)}, not a string")
    return content


def _alpaca_prompt(fields: Mapping[str, Any]) -> list[Message]:
    instruction = _text(fields.get("instruction"), "instruction")
    extra = fields.get("input")
    addition = "" if extra is None else _text(extra, "input")
    text = f"{instruction}\n\n{addition}" if addition else instruction
    return _with_system(fields, [{"role": "user", "content": text}])


def _with_system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the system prompt that stands beside them, if there is one."""
    system = fields.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _prompt(value: object) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, "prompt")
    return [{"role": "user", "content": _text(value, "prompt")}]


def _answer(value: object, key: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, key)
    if isinstance(value, dict):
        return [_message(value, key)]
    return [{"role": "assistant", "content": _text(value, key)}]


def _common_beginning(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages that two conversations share, and what each goes on with."""
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "chosen and rejected are the same")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise BadRow(
            "different prompts", "chosen and rejected begin differently and there is no prompt"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_answers(messages: Sequence[Message], where: str = "the conversation") -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer", f"{where} has no message of the assistant")
    for message in answers:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow("empty answer", f"{where} has an empty message of the assistant")


def _tools(fields: Mapping[str, Any]) -> list[Any] | None:
    tools = fields.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise BadRow("unknown layout", f"'tools' is {kind_of(tools)}, not a list")
    return tools
