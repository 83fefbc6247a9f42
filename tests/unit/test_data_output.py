"""An output that cannot be made is the user's mistake, told before any work, with exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from litespark.cli.main import main
from litespark.data import preprocess as module
from litespark.data.preprocess import PreprocessOptions, prepare_output, preprocess
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import temporary_name
from tests.support.data import train_json_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_json_tokenizer(tmp_path_factory.mktemp("json"))


@pytest.fixture(autouse=True)
def signals_as_before():
    """The command sets a handler for its own process; here that is pytest's."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", ["one", "two"])


def run_main(capsys, **options):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = main(["preprocess", "--workers=1", *words])
    return code, capsys.readouterr().err


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("prefix", "problem"),
    [
        ("{tmp}/out/" + "x" * 300, "File name too long"),
        ("{tmp}/" + "x" * 300 + "/p", "File name too long"),
        ("{tmp}/" + "x/" * 3000 + "p", "File name too long"),
        ("{tmp}/a.jsonl/p", "a part of the path is a file"),
        ("{tmp}/a.jsonl/sub/p", "a part of the path is a file"),
        ("/proc/p", "cannot be made there"),
        ("/proc/sub/p", "cannot be made there"),
        ("", "does not end in a name"),
        ("{tmp}/out/", "does not end in a name"),
        ("{tmp}/out/..", "does not end in a name"),
    ],
)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}], ids=["new", "overwrite"])
def test_unusable_prefix_is_a_user_error(tmp_path, tokenizer, data, prefix, problem, flags):
    prefix = prefix.format(tmp=tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        preprocess(PreprocessOptions((str(data),), str(tokenizer), prefix, **flags))
    assert caught.value.where.startswith("--output-prefix")
    assert caught.value.fix


def test_command_exits_with_2_for_a_prefix_that_is_too_long(capsys, tmp_path, tokenizer, data):
    code, errors = run_main(
        capsys, input=data, tokenizer=tokenizer, output_prefix=tmp_path / ("x" * 300)
    )
    assert code == 2
    assert errors.startswith("litespark: error: --output-prefix")


def test_name_too_long_for_the_manifest_alone_is_refused_before_the_work(tmp_path, tokenizer, data):
    longest_name = 255 - len(temporary_name(tmp_path / "_text_document.bin").name)
    options = PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / ("x" * longest_name)))
    with pytest.raises(UserError, match="File name too long"):
        prepare_output(options)
    prepare_output(
        PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / ("x" * (longest_name - 1))))
    )


def test_folder_of_the_outputs_name_is_refused_even_to_overwrite(tmp_path, tokenizer, data):
    (tmp_path / "p_text_document.idx").mkdir()
    options = PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / "p"), overwrite=True)
    with pytest.raises(UserError, match=r"p_text_document.idx is a folder"):
        preprocess(options)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 1)]
)
def test_writer_that_cannot_open_says_whose_fault_it_is(
    monkeypatch, tmp_path, tokenizer, data, number, exit_code
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "WorkFolder", fail)
    with pytest.raises(LitesparkError, match=os.strerror(number)) as caught:
        preprocess(PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / "p")))
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize("option", ["input", "tokenizer", "output_prefix"])
def test_empty_value_is_refused(capsys, monkeypatch, tmp_path, tokenizer, data, option):
    monkeypatch.chdir(tokenizer)  # where "" taken as a folder would find a tokenizer
    given = {"input": data, "tokenizer": tokenizer, "output_prefix": tmp_path / "p"}
    code, errors = run_main(capsys, **(given | {option: ""}))
    assert code == 2
    assert option.replace("_", "-") in errors
    assert "''" in errors
    assert not list(tmp_path.glob("*_document*"))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--json-keys", "text", "text"], "text is named more than once"),
        (["--partitions", "0"], "--partitions 0: is below 1"),
        (["--json-keys", "text", "title"], "p_title_document.bin exists already"),
        (["--json-keys", "text", "a/b"], "cannot be part of the output's file name"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer", ""], "tokenizer '': is empty"),
    ],
)
def test_tool_refuses_before_it_writes_the_first_key(tmp_path, tokenizer, data, flags, problem):
    (tmp_path / "p_title_document.bin").write_bytes(b"kept")
    done = run_tool(
        *("--input", data, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "p"), *flags
    )
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr
    assert not list(tmp_path.glob("p_text*"))


def test_tools_help_says_what_must_be_installed():
    assert "make install" in run_tool("--help").stdout
