"""`litespark data verify`: a line about an intact shard, exit code 2 for a damaged one."""

from __future__ import annotations

import pytest

from litespark.cli.main import main
from litespark.data.manifest import manifest_path
from litespark.data.preprocess import PreprocessOptions, preprocess
from tests.support.data import train_json_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    data = write_jsonl(folder / "a.jsonl", ["some text", "", "more of it"])
    tokenizer = train_json_tokenizer(folder / "tokenizer")
    written = preprocess(PreprocessOptions((str(data),), str(tokenizer), str(folder / "p")))
    (manifest,) = written.values()
    return folder, manifest.files.tokens


@pytest.fixture
def shard(written, tmp_path):
    folder, _ = written
    for path in folder.glob("p_text_document.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "p_text_document"


def verify(capsys, shard):
    code = main(["data", "verify", str(shard)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_intact_shard_is_said_to_be(capsys, shard, written):
    line = f"{shard}: 3 documents, {written[1]:,} tokens, checksums match, ids below 600\n"
    assert verify(capsys, shard) == (0, line, "")


def test_shard_without_a_manifest_is_checked_as_far_as_it_can_be(capsys, shard):
    manifest_path(shard).unlink()
    code, out, _ = verify(capsys, shard)
    assert code == 0
    assert "no manifest" in out
    assert "match" not in out


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("suffix", "damage", "problem"),
    [
        (".bin", flip_bit, "its bytes are not those that preprocess wrote"),
        (".idx", flip_bit, ""),
        (".bin", cut, "it is cut short"),
        (".idx", cut, "it is cut short"),
        (".bin", lambda path: path.unlink(), "is missing"),
        (".idx", lambda path: path.unlink(), "is missing"),
        (".idx", replace_by_folder, "cannot be read (Is a directory)"),
        (".json", cut, "is not a manifest"),
    ],
)
def test_damage_exits_with_2_and_names_the_file(capsys, shard, suffix, damage, problem):
    path = shard.with_suffix(suffix)
    damage(path)
    code, out, errors = verify(capsys, shard)
    assert (code, out) == (2, "")
    assert errors.startswith(f"litespark: error: {path}: ")
    assert problem in errors


def test_command_without_its_verb_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data"])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
