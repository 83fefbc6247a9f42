"""A tokenizer's chat template: from messages to text, and which of its characters are answers.

The template is Jinja, from the tokenizer's `chat_template.jinja` or `tokenizer_config.json`.  It is
a program from a file that somebody may have downloaded, so it runs in jinja2's immutable sandbox,
as in `transformers`, and reaches nothing but the messages.  `strftime_now` is not defined:
templates that would write today's date (Llama 3) fall back to a fixed one, and the same data gives
the same tokens tomorrow.

Answers are found exactly, in one of two ways:

* Where the template says `{% generation %}` ... `{% endgeneration %}` around what a model
  generates, those are the answers.
* Elsewhere by rendering: with m messages before an answer, the text of the first m with the
  generation prompt is what a model is given, and the text of the first m + 1 is that with its
  answer.  Both must be beginnings of the text of the whole conversation.  A template that writes
  earlier turns otherwise once there are later ones (Qwen 3 drops their thinking) has no such
  beginnings; its rows are refused, by name, unless only the last answer is asked for.

An answer ends with the control token that ends the turn; white space that the template writes after
it is no model's to generate.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from litespark.data.conversations import BadRow, Message
from litespark.errors import UserError

Span = tuple[int, int]
Turns = Literal["all", "last"]

_TEMPLATE_NAME = "chat_template.jinja"
_CONFIG_NAME = "tokenizer_config.json"
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# What no text holds by accident: private-use characters around digits drawn in this process.
_NONCE = secrets.token_hex(8)
_OPEN, _CLOSE = f"\ue000{_NONCE}\ue001", f"\ue002{_NONCE}\ue003"
_MARKS = re.compile(f"{_OPEN}|{_CLOSE}")


class ChatTemplate:
    """One template, ready to render.

    Args:
        source: the Jinja text.
        origin: the file it is from, for messages.
        special_tokens: `bos_token` and the like, as templates name them.
        control_tokens: texts that are one token each and end a turn, such as `<|im_end|>`.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        special_tokens: dict[str, str],
        control_tokens: Sequence[str] = (),
    ) -> None:
        import jinja2

        self.origin = origin
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._special_tokens = special_tokens
        self._control_tokens = tuple(control_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                origin,
                f"is not a chat template that Jinja can read ({error})",
                "Mend it, or name another with --chat-template.",
            ) from None
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, as `tokenizer.apply_chat_template` writes it.

        Raises:
            BadRow: the template refuses the messages.
        """
        return _MARKS.sub("", self._render(messages, tools, add_generation_prompt))

    def render_with_answers(
        self, messages: Sequence[Message], tools: list[Any] | None = None, turns: Turns = "all"
    ) -> tuple[str, list[Span]]:
        """The text, and where in it the answers stand: characters [start, stop), in order.

        Raises:
            BadRow: the template refuses the messages, or says nowhere what its answers are.
        """
        marked = self._render(messages, tools, add_generation_prompt=False)
        if self.has_marks:
            text, spans = _without_marks(marked)
        else:
            text = marked
            spans = list(self._spans_by_beginnings(messages, tools, text, turns))
        spans = [self._trimmed(text, span) for span in spans]
        spans = [span for span in spans if span[0] < span[1]]
        return text, spans[-1:] if turns == "last" else spans

    def answer_span(
        self,
        prompt: Sequence[Message],
        answer: Sequence[Message],
        tools: list[Any] | None = None,
    ) -> tuple[str, Span]:
        """The text of a prompt with its answer, and where the whole answer stands in it.

        Raises:
            BadRow: the template refuses the messages, or the prompt is no beginning of the text.
        """
        text = self.render([*prompt, *answer], tools)
        start = len(self._beginning(prompt, tools, text, add_generation_prompt=True))
        return text, self._trimmed(text, (start, len(text)))

    def _spans_by_beginnings(
        self, messages: Sequence[Message], tools: list[Any] | None, text: str, turns: Turns
    ) -> Iterator[Span]:
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        for number in answers if turns == "all" else answers[-1:]:
            before = self._beginning(messages[:number], tools, text, add_generation_prompt=True)
            until = text
            if number + 1 < len(messages):
                until = self._beginning(messages[: number + 1], tools, text)
            yield len(before), len(until)

    def _beginning(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        text: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        beginning = self.render(messages, tools, add_generation_prompt=add_generation_prompt)
        if not text.startswith(beginning):
            raise BadRow(
                "template rewrites earlier turns",
                f"of {self.origin}: the text of the first {len(messages)} messages"
                f"{' and the generation prompt' if add_generation_prompt else ''} is no beginning "
                "of the whole text, so where answers begin and end cannot be told",
            )
        return beginning

    def _trimmed(self, text: str, span: Span) -> Span:
        """Without the white space that follows the control token at its end."""
        start, stop = span
        end = start + len(text[start:stop].rstrip())
        closes = any(text.endswith(token, start, end) for token in self._control_tokens)
        return (start, end) if closes else span

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadRow("template refused", f"{self.origin} refuses it: {reason[:200]}") from None


def load_chat_template(
    tokenizer_path: Path, control_tokens: Sequence[str], template_path: str | None = None
) -> ChatTemplate:
    """The template beside a tokenizer's file, or the one that is named instead.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    config_path = tokenizer_path.with_name(_CONFIG_NAME)
    config = _read_config(config_path)
    if template_path is not None:
        source, origin = _read_text(Path(template_path)), template_path
    elif tokenizer_path.with_name(_TEMPLATE_NAME).is_file():
        path = tokenizer_path.with_name(_TEMPLATE_NAME)
        source, origin = _read_text(path), str(path)
    else:
        source, origin = _from_config(config), str(config_path)
    if source is None:
        raise UserError(
            f"tokenizer {tokenizer_path.parent}",
            f"has no chat template: neither {_TEMPLATE_NAME} nor chat_template in {_CONFIG_NAME}",
            "Name one with --chat-template FILE, or take a tokenizer that has one.",
        )
    named = {name: _token_text(config.get(name)) for name in _TOKEN_NAMES}
    special_tokens = {name: text for name, text in named.items() if text is not None}
    return ChatTemplate(source, origin, special_tokens, control_tokens)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "Name a chat template.") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(str(path), f"is not valid JSON ({error})", "Fetch it again.") from None
    return config if isinstance(config, dict) else {}


def _from_config(config: dict[str, Any]) -> str | None:
    """The template in `tokenizer_config.json`: a text, or several with names."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    return token if isinstance(token, str) else None


def _environment() -> Any:
    """The sandbox, with what `transformers` gives templates beside the messages."""
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks what its block writes."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the spans between them."""
    pieces: list[str] = []
    spans: list[Span] = []
    length, start, place = 0, 0, 0
    for mark in _MARKS.finditer(marked):
        pieces.append(marked[place : mark.start()])
        length += mark.start() - place
        place = mark.end()
        if mark.group() == _OPEN:
            start = length
        else:
            spans.append((start, length))
    pieces.append(marked[place:])
    return "".join(pieces), spans
