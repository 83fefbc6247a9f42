"""The run report: numbers, escaping, hostile and incomplete input, and the charts' arithmetic."""

import argparse
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from litespark.cli import report as report_command
from litespark.errors import UserError
from litespark.metering import svg
from litespark.metering.charts import smoothed
from litespark.metering.headline import byte_size, headline, large_count
from litespark.metering.png import write_pngs
from litespark.metering.report import render_report, write_report
from litespark.metering.report_energy import energy_shares
from litespark.metering.run_log import read_run
from litespark.metering.svg import Chart, Series, line_chart, thin

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A strict reading of a page: every element is closed in order; collects text and tables."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.rows = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(self.texts)

    def row(self, label):
        return next(row for row in self.rows if row and row[0] == label)


def step_record(step, **changed):
    record = {
        "step": step,
        "tokens": step * 1000,
        "loss": 10 - 0.1 * step,
        "lr": 3e-4,
        "grad_norm": 1.5,
        "step_seconds": 0.5,
        "tokens_per_second": 2000.0,
        "tokens_per_second_per_gpu": 1000.0,
        "tflops_per_gpu_causal": 400.0,
        "tflops_per_gpu_full": 440.0,
        "mfu": 0.4,
        "energy_joules": 700.0,
        "joules_per_token": 0.7,
        "power_watts": 1400.0,
        "memory_bytes": 3 * 2**30,
        "data_wait_seconds": 0.05,
        "checkpoint_seconds": 0.0,
    }
    return record | changed


def make_run(folder, records, config=None, events=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    if events is not None:
        text = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "events.jsonl").write_text(text, encoding="utf-8")
    return folder


CONFIG = """\
task: pretrain
run: {name: first try}
model: {preset: paper-3b, num_layers: 28, hidden_size: 2048, ffn_hidden_size: 11008,
  num_attention_heads: 16, num_query_groups: 2, head_dim: 128, vocab_size: 32000}
parallel: {tensor: 2, pipeline: 4, sequence: true}
data: {sequence_length: 4096}
batch: {micro: 1, global: 64}
"""


def test_the_figures_are_those_of_the_records(tmp_path):
    records = [step_record(step) for step in range(1, 31)]
    records[0] |= {"step_seconds": 20.0, "tokens_per_second": 50.0}  # the median leaves it out
    records.insert(20, {"step": 20, "validation_loss": 8.25})
    records.append({"step": 30, "validation_loss": 7.5})
    run = make_run(tmp_path / "run", records, CONFIG)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.row("Steps")[1:] == ["30", "30 logged steps"]
    assert page.row("Tokens")[1] == "30,000"
    assert page.row("Training loss, first")[1] == "9.9000"
    assert page.row("Training loss, last")[1] == "7.0000"
    assert page.row("Training loss, best")[1:] == ["7.0000", "nats per token, at step 30"]
    assert page.row("Validation loss, last")[1:] == ["7.5000", "nats per token, at step 30"]
    assert page.row("Step time")[1] == "0.5 s"
    assert page.row("Tokens per second")[1] == "2,000"
    assert page.row("TFLOP/s, causal attention")[1] == "400"
    assert page.row("TFLOP/s, full attention")[1] == "440"
    assert page.row("MFU")[1] == "40.0 %"
    assert "causal" in page.row("MFU")[2]
    assert "dense BF16 peak" in page.row("MFU")[2]
    assert page.row("Energy")[1] == "21 kJ"  # 30 lines of 700 J
    assert page.row("Energy per 1k tokens")[1] == "700 J"
    assert page.row("Power")[1] == "1,400 W"
    assert page.row("Peak memory")[1] == "3 GiB"
    assert page.row("Waiting for data")[1] == "4.3 %"  # 30 * 0.05 s of 20 + 29 * 0.5 s
    assert page.row("parallel")[1] == "tensor 2, pipeline 4, sequence yes"
    assert "first try" in page.text
    assert "2.29 billion parameters" in page.text
    assert "14.75 GFLOP a token" in page.text
    assert page.tags.count("svg") == 11


def test_the_page_needs_nothing_from_outside_and_is_reproducible(tmp_path):
    run = make_run(tmp_path / "run", [step_record(step) for step in range(1, 60)], CONFIG)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    page = Page(first.decode("utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert b"url(" not in first
    assert b"@import" not in first
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"] == []


def test_what_was_not_measured_is_said_to_be_so(tmp_path):
    nulls = dict.fromkeys(
        ["mfu", "energy_joules", "joules_per_token", "power_watts", "tflops_per_gpu_causal"]
    )
    records = [step_record(step, **nulls) for step in range(1, 5)]
    page = Page(write_report(make_run(tmp_path / "run", records)).read_text(encoding="utf-8"))
    for label in ("MFU", "Energy", "Power", "TFLOP/s, causal attention", "Validation loss, last"):
        assert page.row(label)[1] == "not measured"
    assert "Not measured: MFU, Power, Energy of training, Energy." in page.text
    assert page.tags.count("svg") == 7
    assert "no config.yaml" in page.text


def test_energy_of_a_part_of_the_steps_says_of_how_many(tmp_path):
    records = [step_record(1), step_record(2, energy_joules=None), step_record(3)]
    page = Page(write_report(make_run(tmp_path / "run", records)).read_text(encoding="utf-8"))
    assert page.row("Energy")[1:] == [
        "1.4 kJ",
        "GPUs only, while training; measured at 2 of 3 logged steps",
    ]


HOSTILE = "</pre></title><script>alert('x')</script>\"&<img src=x onerror=y>"


def test_everything_from_the_files_is_escaped(tmp_path):
    config = (
        f"task: {json.dumps(HOSTILE)}\nrun:\n  name: {json.dumps(HOSTILE)}\n"
        f"parallel:\n  {json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n"
    )
    events = [{"time": 1, "step": 2, "event": "resumed" + HOSTILE, "detail": HOSTILE}]
    records = [step_record(step, **{HOSTILE: 1.0}) for step in range(1, 30)]
    records.append({"step": 29, "validation_loss": 7.0})
    run = make_run(tmp_path / "run", records, config, events)
    other = make_run(tmp_path / ("<b>" + "other"), records)
    html = write_report(run, other).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img", "b>"} & set(page.tags)
    assert page.tags.count("title") == 1
    assert "<script" not in html
    assert "<img" not in html
    assert page.text.count("alert('x')") >= 5  # shown as text in title, heading, tables


def test_one_record(tmp_path):
    page = Page(
        write_report(make_run(tmp_path / "run", [step_record(1)])).read_text(encoding="utf-8")
    )
    assert page.row("Steps")[1:] == ["1", "1 logged step"]
    assert page.row("Training loss, first")[1] == page.row("Training loss, last")[1] == "9.9000"
    assert page.tags.count("circle") == 13  # one for each line of the eleven charts


def test_many_records_stay_small(tmp_path):
    lines = [json.dumps({"step": step, "loss": 3 + math.sin(step)}) for step in range(1, 100_001)]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    html = write_report(run).read_text(encoding="utf-8")
    paths = re.findall(r' d="([^"]*)"', html)
    assert max(path.count("L") + path.count("M") for path in paths) <= svg.MAX_POINTS
    assert len(html) < 200_000


def test_nan_and_null_are_gaps_and_are_counted(tmp_path):
    records = [step_record(step) for step in range(1, 8)]
    records[3]["loss"] = math.nan  # json.dumps writes NaN, as other programs do
    records[5]["loss"] = math.inf
    records[6]["grad_norm"] = None
    run = read_run(make_run(tmp_path / "run", records))
    assert run.non_finite_losses == 2
    assert [math.isnan(loss) for loss in run.column("loss")] == [
        False, False, False, True, False, True, False,
    ]  # fmt: skip
    page = Page(render_report(run))
    assert "The loss was not finite at 2 logged steps." in page.text
    assert page.row("Training loss, last")[2].endswith("at step 7")
    assert "nan" not in "".join(value for name, value in page.attributes if name == "d")


def test_all_losses_nan(tmp_path):
    records = [step_record(step, loss=math.nan) for step in range(1, 4)]
    page = Page(write_report(make_run(tmp_path / "run", records)).read_text(encoding="utf-8"))
    assert page.row("Training loss, last")[1] == "not measured"
    assert "Not measured: Loss." in page.text


def test_steps_done_again_after_a_crash_count_once(tmp_path):
    records = [step_record(step, loss=5.0) for step in range(1, 9)]
    records.insert(6, {"step": 6, "validation_loss": 1.0})
    records += [step_record(step, loss=4.0, new_key=1.0) for step in range(5, 11)]
    run = read_run(make_run(tmp_path / "run", records))
    assert run.steps == list(range(1, 11))
    assert run.column("loss") == [5.0] * 4 + [4.0] * 6
    assert [math.isnan(value) for value in run.column("new_key")] == [True] * 4 + [False] * 6
    assert run.validation == {}
    assert run.resume_steps() == [4]
    assert render_report(run).count('class="mark"') == 11  # one in each chart


def test_resume_events_mark_the_charts(tmp_path):
    events = [
        {"time": 1.0, "step": 0, "event": "started", "detail": "data 2 x tensor 2"},
        {"time": 2.0, "step": 7, "event": "resumed", "detail": {"tensor": 4}},
        {"time": 3.0, "event": "resumed at layout", "detail": {"step": 9}},
        {"time": 4.0, "event": "resumed", "detail": "who knows where"},
    ]
    records = [step_record(step) for step in range(1, 13)]
    run = read_run(make_run(tmp_path / "run", records, events=events))
    assert run.resume_steps() == [7, 9]
    page = Page(render_report(run))
    assert ["7", "resumed", '{"tensor": 4}'] in page.rows
    assert ["", "resumed", "who knows where"] in page.rows


def test_guards_and_restarts_stand_on_the_axis_of_steps(tmp_path):
    events = [
        {"step": 5, "event": "bad_step", "detail": "norm 913"},
        {"step": 8, "event": "resumed", "detail": ""},
        {"step": 9, "event": "checkpoint", "detail": "not marked"},
    ]
    run = make_run(tmp_path / "run", [step_record(s) for s in range(1, 31)], events=events)
    assert read_run(run).marks() == [(5.0, "bad step"), (8.0, "resumed")]
    assert "bad step" in Page(render_report(read_run(run))).text


def test_energy_by_purpose_with_what_came_after_the_last_line_and_what_was_lost(tmp_path):
    records = [step_record(1), step_record(2, evaluation_joules=300.0), step_record(3)]
    records.insert(2, step_record(3))  # done again after a crash
    tail = {"energy_joules": 0.0, "checkpoint_joules": 1000.0, "host_joules": None}
    integrated = {"joules": 3900.0, "uncertainty_joules": 100.0, "seconds": 9.0}
    detail = {"tail": tail, "gpu_joules": 4000.0, "integrated": integrated}
    events = [
        {"step": 3, "event": "energy", "detail": detail},
        {"step": 0, "event": "modules", "detail": {"backend": "triton", "mlp": "<FusedMLP>"}},
    ]
    config = CONFIG + "metering: {grid_grams_per_kwh: 360}\n"
    run = read_run(make_run(tmp_path / "run", records, config, events))
    found = {share.key: share.joules for share in energy_shares(run)}
    assert found == {
        "energy_joules": 2100.0,
        "evaluation_joules": 300.0,
        "checkpoint_joules": 1000.0,
        "lost_joules": 700.0,
    }
    page = Page(render_report(run))
    assert page.row("training")[1:] == ["2.1 kJ", "51.2 %"]
    assert page.row("in all")[1] == "4.1 kJ"
    assert page.row("in all")[2].startswith("0.00041 kg CO2e at 360 g/kWh")
    assert "-2.5 %" in page.text
    assert page.row("mlp")[1] == "<FusedMLP>"
    assert not any("modules" in row for row in page.rows), "no event for people"


def test_a_sum_with_holes_says_so(tmp_path):
    records = [step_record(1), step_record(2, energy_joules=None), step_record(3)]
    page = Page(render_report(read_run(make_run(tmp_path / "run", records))))
    assert "2 of 3 lines" in page.row("in all")[2]


def test_a_run_without_energy_has_no_section_for_it(tmp_path):
    records = [step_record(1, energy_joules=None, joules_per_token=None, power_watts=None)]
    page = Page(render_report(read_run(make_run(tmp_path / "run", records))))
    assert "steps that were lost" not in page.text
    assert all(row[0] != "in all" for row in page.rows if row)


def test_charts_as_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", [step_record(s) for s in range(1, 31)], CONFIG)
    written = write_pngs(read_run(run), None, ("a", ""), tmp_path / "png")
    assert {path.name for path in written} >= {"loss.png", "energy.png", "memory.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_comparison(tmp_path):
    mine = make_run(
        tmp_path / "a", [step_record(s, tokens_per_second=2200.0) for s in range(1, 50)], CONFIG
    )
    theirs = make_run(
        tmp_path / "b",
        [step_record(s, mfu=None) for s in range(1, 50)],
        CONFIG.replace("tensor: 2", "tensor: 8"),
    )
    output = tmp_path / "compared.html"
    assert write_report(mine, theirs, output) == output
    assert not (mine / "report.html").exists()
    page = Page(output.read_text(encoding="utf-8"))
    assert page.row("Tokens per second")[1:4] == ["2,200", "2,000", "+10.0 %"]
    assert page.row("MFU")[1:4] == ["40.0 %", "not measured", ""]
    assert page.row("Power")[3] == "none"
    assert page.row("parallel.tensor")[1:] == ["2", "8"]
    assert "first try (a)" in page.text  # the same name: told apart by folder
    assert "first try (b)" in page.text


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('{"step": 1, "loss": 2}\nnonsense\n', ":2", "no JSON"),
        ('{"step": 1, "loss": 2}\n\xff\n', ":2", "no JSON"),
        ("[" * 100_000 + "\n", ":1", "no JSON"),
        ("[1, 2]\n", ":1", "no JSON object"),
        ('{"loss": 2}\n', ":1", "step is None"),
        ('{"step": true}\n', ":1", "step is True"),
        ('{"step": 1, "loss": "low"}\n', ":1", "loss is 'low'"),
        ("\n", "metrics.jsonl", "no step has been logged"),
        ('{"step": 1, "validation_loss": 2}\n', "metrics.jsonl", "no step has been logged"),
    ],
)
def test_bad_metrics_are_errors_with_their_place(tmp_path, text, place, problem):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    assert caught.value.where.endswith(place)
    assert problem in caught.value.problem
    assert not (tmp_path / "report.html").exists()


def test_missing_folder_and_missing_metrics(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no metrics"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "run", [step_record(1)])
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_report(run, output=tmp_path / "nowhere" / "page.html")
    assert "--output" in caught.value.fix


def test_bad_config_is_an_error_with_its_line(tmp_path):
    run = make_run(tmp_path / "run", [step_record(1)], "a: 1\nb: [\n")
    with pytest.raises(UserError, match=r"config\.yaml:3: the file is no YAML"):
        write_report(run)


@pytest.mark.parametrize("config", ["", "- 1\n", "model: 7\nrun: {name: 3}\nparallel: [1]\n"])
def test_a_config_of_another_form_is_left_out(tmp_path, config):
    run = make_run(tmp_path / "run", [step_record(1)], config)
    assert "no config.yaml that tells the layout" in write_report(run).read_text(encoding="utf-8")


def test_a_line_being_written_is_not_an_error(tmp_path):
    run = make_run(tmp_path / "run", [step_record(1), step_record(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.row("Steps")[1] == "2"
    assert "The last line of a file is incomplete" in page.text


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report_command.add_parser(parser.add_subparsers())
    run = make_run(tmp_path / "run", [step_record(1)])
    args = parser.parse_args(["report", str(run)])
    assert args.run(args) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    args = parser.parse_args(["report", str(run), "--output", str(tmp_path / "x.html")])
    assert args.run(args) == 0
    assert (tmp_path / "x.html").is_file()


def test_linear_ticks_are_round_and_inside():
    assert svg.linear_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert svg.linear_ticks(2.31, 2.79, 4) == pytest.approx([2.4, 2.5, 2.6, 2.7])
    assert svg.linear_ticks(0, 3e-4, 3) == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    assert svg.linear_ticks(1, 3, 9, smallest_step=1.0) == [1, 2, 3]


def test_log_ticks_cover_few_and_many_decades():
    assert svg.log_ticks(0.15, 9, 6) == pytest.approx([0.2, 0.5, 1, 2, 5])
    assert svg.log_ticks(1e-9, 1e3, 5) == pytest.approx([1e-9, 1e-6, 1e-3, 1, 1e3])


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([0, 0.5, 1], ["0", "0.5", "1.0"]),
        ([0, 5000, 10_000], ["0", "5k", "10k"]),
        ([0, 500_000, 1_000_000, 1_500_000], ["0", "0.5M", "1.0M", "1.5M"]),
        ([0.001, 0.1, 10], ["1e-3", "0.1", "10"]),
        ([7], ["7"]),
        ([], []),
    ],
)
def test_tick_labels(ticks, labels):
    assert svg.tick_labels(ticks) == labels


def test_thinning_keeps_spikes_order_and_gaps():
    y = [1.0] * 50_000
    y[31_234], y[41_000] = 99.0, -5.0
    y[10_000:20_000] = [math.nan] * 10_000
    points = thin(range(50_000), y)
    assert len(points) <= svg.MAX_POINTS
    assert (31_234, 99.0) in points
    assert (41_000, -5.0) in points
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert any(math.isnan(value) for _, value in points)


def test_outliers_are_cut_and_counted():
    seconds = [0.5] * 200
    seconds[0], seconds[50] = 40.0, 3.0
    series = [Series("run", range(200), seconds)]
    chart = Chart("t", "step", "s", series, from_zero=True, clips_outliers=True)
    assert "2 points above, up to 40" in line_chart(chart)
    coordinates = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line_chart(chart))]
    assert min(coordinates) >= 0


def test_a_chart_without_values_is_nothing():
    assert line_chart(Chart("t", "x", "y", [Series("a", [1, 2], [math.nan, math.nan])])) == ""


def test_a_wide_range_gets_a_logarithmic_axis():
    y = [10.0**-k for k in range(6)]
    picture = line_chart(Chart("t", "step", "y", [Series("a", range(6), y)]))
    heights = [
        float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", picture.split('class="line')[1])
    ]
    gaps = [b - a for a, b in pairwise(heights)]
    assert gaps == pytest.approx([gaps[0]] * 5, abs=0.2)


def test_labels_of_marks_do_not_overlap():
    chart = Chart(
        "t", "step", "y", [Series("a", range(1000), [1.0] * 1000)],
        marks=[(float(step), "resumed") for step in range(0, 1000, 20)],
    )  # fmt: skip
    picture = line_chart(chart)
    places = [float(x) for x in re.findall(r'x="([\d.]+)"[^>]*>resumed<', picture)]
    assert picture.count('class="mark"') == 50
    assert 3 < len(places) < 15
    assert min(b - a for a, b in pairwise(places)) > 45


def test_smoothing_follows_a_line_exactly_and_skips_nan():
    line = [5 - 0.01 * k for k in range(400)]
    assert smoothed(line) == pytest.approx(line)
    line[100] = math.nan
    result = smoothed(line)
    assert math.isnan(result[100])
    assert all(math.isfinite(value) for k, value in enumerate(result) if k != 100)


def test_numbers_for_people():
    assert [byte_size(n) for n in (0, 512, 2048, 3.5 * 2**30)] == [
        "0 B",
        "512 B",
        "2 KiB",
        "3.5 GiB",
    ]
    assert [large_count(n) for n in (812_345, 2.289e9, 1.5e12)] == [
        "812,345",
        "2.29 billion",
        "1.5 trillion",
    ]
    assert short_numbers() == ["0", "9999", "12.5k", "3.2M", "0.015", "3e-4"]


def short_numbers():
    return [svg.short_number(value) for value in (0, 9999, 12_500, 3.2e6, 0.015, 3e-4)]


def test_headline_of_other_keys_than_ours(tmp_path):
    run = read_run(make_run(tmp_path / "run", [{"step": 0, "mine": 1}]))
    assert [figure.label for figure in headline(run) if figure.value is not None] == ["Steps"]
