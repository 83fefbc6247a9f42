"""What `litespark bench` prints: figures, ours and a peer's, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Record = dict[str, Any]
Row = tuple[str, ...]

_ABSENT = "-"
_NAME_LENGTH = 110  # names of CuTe and CUTLASS kernels go on for hundreds of characters


def result_table(result: Record) -> str:
    """The figures of a measurement as lines of text; with `peer` in it, both and their ratio."""
    columns = [result] if result.get("peer") is None else [result, result["peer"]]
    rows: list[Row] = [("", *(column["implementation"] for column in columns))]
    if len(columns) > 1:
        rows[0] = (*rows[0], "ratio")
    for label, key, show in _FIGURES:
        values = [_at(column, key) for column in columns]
        row = (label, *(_ABSENT if value is None else show(value) for value in values))
        if len(columns) > 1:
            row = (*row, _ABSENT if key in _NO_RATIO else _ratio(*values))
        rows.append(row)
    text = f"{_title(result)}\n\n{_aligned(rows[len(columns) == 1 :])}"
    if result.get("mfu_peak_tflops"):
        text += f"\nMFU: causal attention over {result['mfu_peak_tflops']:g} TFLOP/s (dense BF16)\n"
    if result.get("energy_check"):
        text += "\n" + (
            "energy: {counter_joules:,.0f} J by the counter, "
            "{integrated_joules:,.0f} +/- {uncertainty_joules:,.0f} J by {samples} samples of "
            "power over {seconds:.1f} s: {percent_off:+.2f} %\n"
        ).format(**result["energy_check"])
    if any(column.get("breakdown") for column in columns):
        text += f"\n{_aligned(list(_breakdown_rows(columns)))}"
    return text


def kernel_table(breakdown: Record) -> str:
    """The most expensive kernels, one a line."""
    lines = [f"{'us/token':>9} {'count':>6}  {'family':16}  kernel"]
    for kernel in breakdown["top_kernels"]:
        figures = f"{kernel['us_per_token']:9.3f} {kernel['count']:6d}"
        lines.append(f"{figures}  {kernel['family']:16}  {kernel['name'][:_NAME_LENGTH]}")
    return "\n" + "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"


_NO_RATIO = {"loss", "micro_batch"}

# label, key (below a dot: a key of the object there), how it is written
_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ("  slowest step", "tokens_per_second_min", "{:,.0f}".format),
    ("  fastest step", "tokens_per_second_max", "{:,.0f}".format),
    ("tokens/s per GPU", "tokens_per_second_per_gpu", "{:,.0f}".format),
    ("micro-batch", "micro_batch", str),
    ("step, median", "step_seconds.median", _seconds),
    ("TFLOP/s per GPU, causal", "tflops_per_gpu_causal", "{:.1f}".format),
    ("TFLOP/s per GPU, full", "tflops_per_gpu_full", "{:.1f}".format),
    ("MFU", "mfu", "{:.1%}".format),
    ("J per 1000 tokens", "joules_per_1000_tokens", "{:.2f}".format),
    ("W per GPU", "watts_per_gpu", "{:.0f}".format),
    ("peak memory, GiB", "peak_memory_gib", "{:.1f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("set-up", "set_up_seconds", _seconds),
    ("first step", "first_step_seconds", _seconds),
)


def _title(result: Record) -> str:
    precision = result["precision"]
    mode = precision["mode"]
    if mode == "fp8" and precision.get("recipe"):
        mode = f"fp8 {precision['recipe']}"
    return (
        f"{result['model']}, {_parameters(result['parameters'])}, {mode}, "
        f"sequence {result['sequence_length']}, micro-batch {result['micro_batch']} x "
        f"{result['accumulate']}, {result['tokens']} tokens\n"
        f"{result['gpus']} x {result['device']} ({result['parallel']}), "
        f"{result['n']} steps after {result['warmup']}"
    )


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def _breakdown_rows(columns: list[Record]) -> Iterator[Row]:
    """Each part with its microseconds a token; families below "everything else"."""
    breakdowns = [column.get("breakdown") or {} for column in columns]

    def row(label: str, section: str, key: str) -> Row:
        values = [breakdown.get(section, {}).get(key) for breakdown in breakdowns]
        return (label, *(_ABSENT if value is None else f"{value:.3f}" for value in values))

    yield ("us per token", *(column["implementation"] for column in columns))
    known = next(breakdown for breakdown in breakdowns if breakdown)
    families: dict[str, None] = {}
    for breakdown in breakdowns:
        families |= dict.fromkeys(breakdown.get("everything_else_us_per_token", ()))
    for part in known["parts_us_per_token"]:
        yield row(part, "parts_us_per_token", part)
        if part == "everything else":
            for family in families:
                yield row(f"  {family}", "everything_else_us_per_token", family)
    walls = [breakdown.get("wall_us_per_token") for breakdown in breakdowns]
    yield ("step", *(_ABSENT if wall is None else f"{wall:.3f}" for wall in walls))


def _at(record: Record, key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.3f}" if ours is not None and theirs else _ABSENT


def _aligned(rows: list[Row]) -> str:
    """Columns as wide as their longest word: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [row[0].ljust(widths[0])]
        words += [word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(words))
    return "\n".join(lines) + "\n"
