"""The choice of an attention library: who is asked, what is kept, and that ranks agree."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from litespark.errors import LitesparkError, UserError
from litespark.modules.attention_backends import (
    BACKENDS,
    AttentionBackend,
    AttentionCase,
    MathAttention,
)
from litespark.modules.attention_choice import (
    AttentionChooser,
    Choice,
    choose_attention,
    default_cache_path,
    even_documents,
    random_inputs,
)
from litespark.modules.documents import Documents
from tests.support.spawn import run_distributed

H100 = AttentionCase(4, 4096, 4096, 16, 2, 128, torch.bfloat16, "cuda", (9, 0))
HALF_ONLY = {"flash2", "flash3", "flash-cute", "sdpa-flash", "cudnn"}


class Fake(AttentionBackend):
    """Computes nothing; says what it is told to say."""

    def __init__(self, name, *, absent=None, unable=None, last_resort=False):
        self.name = name
        self.absent = absent
        self.unable = unable
        self.last_resort = last_resort

    def missing(self):
        return self.absent

    def _limits(self, case):
        return () if self.unable is None else ((True, self.unable),)

    def _attend_rows(self, qkv_bsnd, scale, causal):
        raise AssertionError("the choice must not compute")


class Clock:
    """Measures by a table; None: the backend raises."""

    def __init__(self, **milliseconds):
        self.milliseconds = milliseconds
        self.asked = []

    def __call__(self, backend, case):
        self.asked.append(backend.name)
        time = self.milliseconds[backend.name]
        if time is None:
            raise RuntimeError("CUDA error: out of luck\nCompile with TORCH_USE_CUDA_DSA")
        return time


def chooser(clock, path, backends=None, machine="H100, torch 2.11"):
    names = clock.milliseconds if backends is None else ()
    return AttentionChooser(
        backends or [Fake(name) for name in names], clock, lambda: machine, lambda: path
    )


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "attention.json"


def test_the_fastest_is_taken_and_measured_once(path, caplog):
    clock = Clock(a=3.0, b=1.93, c=2.214)
    chosen = chooser(clock, path)
    with caplog.at_level(logging.INFO, logger="litespark"):
        assert [chosen.choose(H100).name for _ in range(3)] == ["b", "b", "b"]
    assert clock.asked == ["a", "b", "c"]
    assert caplog.messages == [f"attention: b (1.93 ms; c 2.21, a 3.00) for {H100}"]


def test_measuring_is_no_part_of_a_recomputed_pass(path):
    """The first use of a case is within `checkpoint` where attention is recomputed."""
    values = torch.ones(3, requires_grad=True)
    measured = []

    def measure(backend, case):
        leaf = torch.full((3,), 2.0, requires_grad=True)
        (gradient,) = torch.autograd.grad((leaf * leaf).sum(), [leaf])
        measured.append(gradient.tolist())
        return {"a": 2.0, "b": 1.0}[backend.name]

    chosen = AttentionChooser([Fake("a"), Fake("b")], measure, lambda: "H100", lambda: path)

    def attend(x):
        assert chosen.choose(H100).name == "b"
        return (x * x).sum()

    checkpoint(attend, values, use_reentrant=False).backward()
    assert measured == [[4.0, 4.0, 4.0]] * 2
    assert values.grad.tolist() == [2.0, 2.0, 2.0]


def test_another_process_reads_the_file_of_results(path):
    chooser(Clock(a=2.0, b=1.0), path).choose(H100)
    later = Clock(a=1.0, b=2.0)
    again = chooser(later, path)
    assert again.choose(H100).name == "b"
    assert later.asked == []
    assert again.choose(replace(H100, batch=1)).name == "a", "another case is measured"
    assert len(json.loads(path.read_text())) == 2, "and the first result stays"


def test_results_of_another_machine_do_not_count(path):
    chooser(Clock(a=2.0, b=1.0), path).choose(H100)
    assert chooser(Clock(a=1.0, b=2.0), path, machine="A100").choose(H100).name == "a"


def test_a_result_that_is_no_candidate_any_more_is_measured_again(path):
    chooser(Clock(a=2.0, b=1.0, c=3.0), path).choose(H100)
    clock = Clock(a=2.0, b=1.0, c=3.0)
    backends = [Fake("a"), Fake("b", absent="the Python module 'b' is not installed"), Fake("c")]
    assert chooser(clock, path, backends).choose(H100).name == "a"
    assert clock.asked == ["a", "c"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"H100, torch 2.11 | ',
        "[1]",
        "\ud800",
        "[" * 100_000,
        '{"KEY": 3}',
        '{"KEY": {"backend": "b"}}',
        '{"KEY": {"backend": ["b"], "milliseconds": {}, "failures": {}}}',
        '{"KEY": {"backend": "b", "milliseconds": {"b": "fast"}, "failures": {}}}',
        '{"KEY": {"backend": "rm", "milliseconds": {"rm": 0}, "failures": {}}}',
    ],
)
def test_a_damaged_file_of_results_is_written_anew(path, content):
    path.parent.mkdir()
    text = content.replace("KEY", f"H100, torch 2.11 | {H100}")
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert chooser(Clock(a=1.0, b=2.0), path).choose(H100).name == "a"
    assert next(iter(json.loads(path.read_text()).values()))["backend"] == "a"


def test_a_file_that_cannot_be_written_is_no_failure(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    clock = Clock(a=1.0, b=2.0)
    assert chooser(clock, tmp_path / "cache" / "attention.json").choose(H100).name == "a"
    assert "is not kept for the next run" in caplog.text
    assert chooser(clock, None).choose(H100).name == "a"


def test_a_failing_candidate_is_left_out_and_named(path, caplog):
    assert chooser(Clock(a=None, b=2.0, c=3.0), path).choose(H100).name == "b"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [
        "attention: a failed when measured and is not used: RuntimeError: CUDA error: out of luck"
    ]


def test_the_last_resort_is_measured_only_when_all_others_fail(path):
    backends = [Fake("a"), Fake("b"), Fake("math", last_resort=True)]
    clock = Clock(a=2.0, b=1.0, math=0.5)
    assert chooser(clock, path, backends).choose(H100).name == "b"
    assert clock.asked == ["a", "b"]
    failing = Clock(a=None, b=None, math=9.0)
    fresh = chooser(failing, None, backends)
    assert fresh.choose(H100).name == "math"
    with pytest.raises(LitesparkError, match="every attention backend failed"):
        chooser(Clock(a=None, b=None, math=None), None, backends).choose(H100)


def test_one_candidate_is_taken_unmeasured(path, caplog):
    backends = [Fake("a", unable="takes no grouped heads"), Fake("b"), Fake("m", last_resort=True)]
    with caplog.at_level(logging.INFO, logger="litespark"):
        assert chooser(Clock(), path, backends).choose(H100).name == "b"
    assert caplog.messages == [f"attention: b, the only one for {H100}"]
    none = [Fake("a", unable="takes no grouped heads"), Fake("b", absent="not installed")]
    with pytest.raises(LitesparkError, match=r"a: takes no grouped heads; b: not installed"):
        chooser(Clock(), path, none).choose(H100)


def test_unmeasured_the_first_is_taken_and_the_case_stays_open(path):
    clock = Clock(a=2.0, b=1.0)
    chosen = chooser(clock, path)
    assert chosen.choose(H100, measure=False).name == "a"
    assert clock.asked == []
    assert chosen.choose(H100).name == "b"
    assert chosen.choose(H100, measure=False).name == "b", "once known, it is used everywhere"


def test_forcing(path):
    backends = [
        Fake("a"),
        Fake("b", unable="takes no bfloat16"),
        Fake("c", absent="the Python module 'c' is not installed"),
    ]
    chosen = chooser(Clock(a=1.0), path, backends)
    assert chosen.choose(H100, force="a").name == "a"
    with pytest.raises(UserError, match=r"'b' for .*: takes no bfloat16\. .*a: can be used"):
        chosen.choose(H100, force="b")
    with pytest.raises(UserError, match="module 'c' is not installed"):
        chosen.choose(H100, force="c")
    with pytest.raises(UserError, match=r"'d' .*there is no such backend.*b: takes no bfloat16"):
        chosen.choose(H100, force="d")


def test_on_a_cpu_math_is_taken_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = AttentionCase(1, 5, 5, 4, 2, 6, dtype, "cpu")
        assert choose_attention(case).name == "sdpa-math"
        documents = replace(case, variable_length=True)
        assert choose_attention(documents).name == "sdpa-math"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"'cudnn' for .*: needs a CUDA device"):
        choose_attention(case, force="cudnn")


@pytest.mark.parametrize(
    ("change", "unable"),
    [
        ({}, {"sdpa-efficient"}),
        ({"groups": 16}, set()),
        ({"q_length": 64}, {"sdpa-efficient", "cudnn"}),
        ({"q_length": 127, "kv_length": 127}, {"sdpa-efficient", "cudnn"}),
        ({"q_length": 128, "kv_length": 128}, {"sdpa-efficient"}),
        ({"q_length": 1}, {"sdpa-efficient", "cudnn"}),
        ({"q_length": 1, "kv_length": 1}, {"sdpa-efficient", "cudnn"}),
        ({"variable_length": True}, {"sdpa-efficient", "cudnn"}),
        ({"head_dim": 256}, {"sdpa-efficient", "cudnn"}),
        ({"head_dim": 12, "groups": 16}, {b.name for b in BACKENDS} - {"sdpa-math"}),
        ({"dtype": torch.float32, "groups": 16}, HALF_ONLY),
        ({"capability": (8, 0)}, {"sdpa-efficient", "flash3", "flash-cute"}),
        ({"capability": (10, 0)}, {"sdpa-efficient", "flash3"}),
        ({"capability": (10, 0), "groups": 16, "head_dim": 192}, {"flash3", "flash-cute", "cudnn"}),
        ({"capability": (7, 5), "groups": 16}, HALF_ONLY),
    ],
)
def test_what_each_library_can(change, unable):
    case = replace(H100, **change)
    assert {b.name for b in BACKENDS if b.supports(case) is not None} == unable


def test_libraries_that_are_not_there_say_so():
    absent = {b.name: b.missing() for b in BACKENDS}
    for torch_own in ("sdpa-flash", "sdpa-efficient", "sdpa-math", "cudnn"):
        assert absent[torch_own] is None
    for other in ("flash2", "flash3", "flash-cute"):
        available = next(b for b in BACKENDS if b.name == other).is_available()
        assert available == (absent[other] is None)
        assert available or "flash_attn" in (absent[other] or "")


def test_flash_attention_4_alone_is_not_taken_for_version_2(tmp_path, monkeypatch):
    """It installs the folder `flash_attn/cute` and makes `flash_attn` a namespace."""
    (tmp_path / "flash_attn_like" / "cute").mkdir(parents=True)
    (tmp_path / "broken_flash.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    from litespark.modules.attention_backends import FlashLibrary

    assert "has no flash_attn_func" in (FlashLibrary("x", "flash_attn_like", {}).missing() or "")
    assert "undefined symbol" in (FlashLibrary("y", "broken_flash", {}).missing() or "")


@pytest.mark.parametrize(
    "change",
    [{"groups": 3}, {"q_length": 5000}, {"q_length": 64, "variable_length": True}],
)
def test_cases_without_a_mask_are_refused(change):
    with pytest.raises(LitesparkError):
        replace(H100, **change)
    if "q_length" in change and not change.get("variable_length"):
        replace(H100, **change, causal=False)


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "litespark" / "attention.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/invalid")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / ".cache" / "litespark" / "attention.json"


def test_random_inputs_leave_the_runs_random_numbers_alone():
    case = AttentionCase(2, 3, 5, 4, 2, 8, torch.float32, "cpu")
    state = torch.get_rng_state()
    q_sbnd, k_sbgd, v_sbgd, gradient_sbnd = random_inputs(case, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert q_sbnd.shape == gradient_sbnd.shape == (3, 2, 4, 8)
    assert k_sbgd.shape == v_sbgd.shape == (5, 2, 2, 8)
    assert not torch.equal(k_sbgd, v_sbgd)
    output_bsnd = MathAttention().attend(*(t.transpose(0, 1) for t in (q_sbnd, k_sbgd, v_sbgd)))
    torch.autograd.grad(output_bsnd, (q_sbnd, k_sbgd, v_sbgd), gradient_sbnd.transpose(0, 1))


@pytest.mark.parametrize("total", [1, 5, 8, 4099])
def test_even_documents_cover_all_tokens(total):
    case = AttentionCase(1, total, total, 1, 1, 8, torch.float32, "cpu", variable_length=True)
    documents = even_documents(case, torch.device("cpu"))
    assert isinstance(documents, Documents)
    lengths = documents.cu_seqlens.diff()
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens[0] == 0
    assert documents.cu_seqlens[-1] == total
    assert lengths.min() >= 1
    assert lengths.max() == documents.max_length
    assert even_documents(replace(case, variable_length=False), torch.device("cpu")) is None


def test_a_choice_survives_json():
    choice = Choice("a", {"a": 1.5, "b": 2.0}, {"c": "RuntimeError: x"})
    assert Choice.parse(json.loads(json.dumps(choice.__dict__))) == choice
    assert Choice.parse(None) is None


def _choose_on_rank(rank, world_size, folder, failing):
    """Each rank's clock finds another library the fastest, and has a cache of its own."""
    torch.distributed.init_process_group("gloo")
    times = {"a": float(rank), "b": float(1 - rank)}
    clock = Clock(**{name: None if failing else time for name, time in times.items()})
    chosen = chooser(clock, Path(folder) / f"{rank}.json")
    second = replace(H100, batch=1)
    # The ranks meet the cases in opposite orders, as pipeline stages may: no collective would end.
    cases = (H100, second) if rank == 0 or failing else (second, H100)
    try:
        return {case.batch: chosen.choose(case).name for case in cases}, len(clock.asked)
    except LitesparkError as error:
        return str(error)
    finally:
        torch.distributed.barrier()  # rank 0 holds the store


@pytest.mark.distributed
def test_all_ranks_take_the_same(tmp_path):
    (names, asked), (others, others_asked) = run_distributed(
        _choose_on_rank, 2, str(tmp_path), False
    )
    assert names == others
    assert asked + others_asked == 4, "two libraries and two cases, measured by one rank each"


@pytest.mark.distributed
def test_a_rank_that_cannot_choose_does_not_keep_the_others_waiting(tmp_path):
    messages = run_distributed(_choose_on_rank, 2, str(tmp_path), True, timeout_seconds=60)
    assert sum("every attention backend failed" in message for message in messages) == 1
    assert sum("another rank failed" in message for message in messages) == 1
