"""A histogram of document lengths, as lines of text and as a PNG; each bar is twice as wide."""

from __future__ import annotations

import os
from importlib.util import find_spec

from litespark.data.statistics import LengthCounts
from litespark.errors import MissingExtraError
from litespark.utils.files import atomic_write

_BAR_CHARACTERS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def terminal_histogram(lengths: LengthCounts, encoding: str | None = "utf-8") -> list[str]:
    """Return a line for each bin: its lengths in tokens, a bar, its documents and their share.

    Bars are of block characters where `encoding` has them, of `#` elsewhere.
    """
    bins = lengths.histogram()
    largest = max(documents for _, _, documents in bins)
    labels = [_label(first, last) for first, last, _ in bins]
    width = max(map(len, labels))
    has_blocks = _can_encode(_EIGHTHS, encoding)
    lines = []
    for label, (_, _, documents) in zip(labels, bins, strict=True):
        bar = _bar(documents / largest, has_blocks)
        share = documents / lengths.documents
        lines.append(f"{label:>{width}} |{bar:<{_BAR_CHARACTERS}} {documents:,} ({share:.1%})")
    return lines


def require_matplotlib() -> None:
    """Refuse to go on without the library that draws.

    Raises:
        MissingExtraError: when it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot", "--png")


def write_png(lengths: LengthCounts, path: str | os.PathLike[str]) -> None:
    """Draw the histogram, and where the percentiles 5, 50 and 95 lie, into a PNG file.

    Raises:
        MissingExtraError: when matplotlib is not installed.
        OSError: when the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, so no display is asked for

    bins = lengths.histogram()
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(bins))
    axes.bar(places, [documents for _, _, documents in bins], width=0.9, color="#3b6fb6")
    labels = [_label(first, last).replace("-", "-\n") for first, last, _ in bins]
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.grid(axis="y", alpha=0.3)
    percentiles = ", ".join(f"{p} %: {lengths.percentile_tokens(p):,}" for p in (5, 50, 95))
    axes.set_title(
        f"{lengths.documents:,} documents, {lengths.tokens:,} tokens ({percentiles})", fontsize=10
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _label(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _bar(share: float, has_blocks: bool) -> str:
    if share == 0:
        return ""
    if not has_blocks:
        return "#" * max(1, round(share * _BAR_CHARACTERS))
    eighths = max(1, round(share * _BAR_CHARACTERS * 8))  # what is there is seen
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
