"""Documents come out in order, and whatever yields none is named with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from litespark.data import readers
from litespark.data.documents import BadLine, numbered_lines, parse_line
from litespark.data.readers import Source, find_sources, iterate_blocks
from litespark.errors import UserError
from tests.support.data import write_jsonl

SKIPPABLE_FRAME = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"abcde"


def stop(bad):
    raise bad.as_error()


def read_documents(inputs, json_key, on_bad_line):
    """Yield (text, path, line) of every document, as the preprocessor and its workers do."""
    for source in find_sources(inputs):
        for block in iterate_blocks(source):
            for line, raw in numbered_lines(block):
                parsed = parse_line(raw, [json_key])
                if isinstance(parsed, str):
                    on_bad_line(BadLine(source.path, line, parsed))
                else:
                    yield parsed.texts[0], source.path, line


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zst(data):
    return zstandard.ZstdCompressor(level=3).compress(data)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.zst", ".jsonl.gz"])
def test_every_format_gives_the_documents_with_their_lines(tmp_path, suffix):
    data = lines_of(["one", "Zwei äöü\u2019", "", "four\nlines"])
    pack = {".zst": zst, ".gz": gzip.compress}.get(
        suffix[-4:], gzip.compress if "gz" in suffix else bytes
    )
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(data))
    assert list(read_documents([str(path)], "text", stop)) == [
        ("one", str(path), 1),
        ("Zwei äöü\u2019", str(path), 2),
        ("", str(path), 3),
        ("four\nlines", str(path), 4),
    ]


def test_folder_is_searched_recursively_and_sorted_and_passes_over_other_files(tmp_path):
    for name in ("b/chunk2/x.jsonl", "b/chunk1/y.jsonl", "a.jsonl", "b/chunk1/x.jsonl"):
        write_jsonl(tmp_path / "slim" / name, [name])
    (tmp_path / "slim" / "config.json").write_text("{}")
    (tmp_path / "slim" / "readme.txt").write_text("x")
    texts = [text for text, _, _ in read_documents([str(tmp_path / "slim")], "text", stop)]
    assert texts == ["a.jsonl", "b/chunk1/x.jsonl", "b/chunk1/y.jsonl", "b/chunk2/x.jsonl"]
    names = [source.name for source in find_sources([str(tmp_path / "slim")])]
    assert names[0] == "slim/a.jsonl"


def test_glob(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write_jsonl(tmp_path / name, [name])
    texts = [text for text, _, _ in read_documents([f"{tmp_path}/*.jsonl"], "text", stop)]
    assert texts == ["a.jsonl", "b.jsonl"]


def test_wrong_inputs_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.csv").write_bytes(b"text")
    (tmp_path / "empty").mkdir()
    for inputs, message in [
        ([str(tmp_path / "none.jsonl")], "no such file"),
        ([str(tmp_path / "*.gz")], "matches nothing"),
        ([str(tmp_path / "a.csv")], "suffix"),
        ([str(tmp_path / "empty")], "holds no"),
        ([str(file), str(file)], "named twice"),
        ([""], "is empty"),
        ([str(tmp_path / ("x" * 5000))], "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            find_sources(inputs)


def test_what_is_no_regular_file_is_refused_and_named(tmp_path):
    folder = tmp_path / "f[1]"  # a name that is a glob too, and as such matches "f1"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ["x"])
    broken = folder / "sub" / "broken.jsonl"
    broken.symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for given, named in [
        (broken, broken),
        (folder, broken),
        (f"{tmp_path}/f*/sub/*", broken),
        (f"{tmp_path}/f*/**", broken),
        (tmp_path / "pipe.jsonl", tmp_path / "pipe.jsonl"),
        (f"{tmp_path}/pipe*", tmp_path / "pipe.jsonl"),
        ("/dev/null", "/dev/null"),
    ]:
        with pytest.raises(UserError, match="is no regular file") as caught:
            find_sources([str(given)])
        assert caught.value.where == f"--input {named}"


def test_a_globs_match_is_no_glob_again(tmp_path):
    (tmp_path / "a[1].jsonl").symlink_to(tmp_path / "gone.jsonl")
    write_jsonl(tmp_path / "a1.jsonl", ["y"])  # what the link's name matches as a glob
    with pytest.raises(UserError, match="is no regular file"):
        find_sources([f"{tmp_path}/a?1?.jsonl"])


def test_one_file_by_two_paths_is_named_twice(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "fold" / "x.jsonl", ["x"])
    (tmp_path / "link.jsonl").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for inputs in [
        ["fold", str(file)],
        ["fold/x.jsonl", "./fold/../fold/x.jsonl"],
        ["fold/x.jsonl", "link.jsonl"],
        ["fold/*.jsonl", "fold"],
    ]:
        with pytest.raises(UserError, match="named twice"):
            find_sources(inputs)
    (tmp_path / "fold" / "y.jsonl").symlink_to(file)
    for given in ("fold", "fold/*", "fold/**"):
        with pytest.raises(UserError, match=r"named twice \(first as fold/x.jsonl\)"):
            find_sources([given])


@pytest.mark.parametrize("pattern", ["fj/**", "fj/**/*", "fj/**/*.jsonl", "**/sub*", "**/fj"])
def test_recursive_glob_takes_each_file_once(tmp_path, monkeypatch, pattern):
    names = ["fj/a.jsonl", "fj/b/c.jsonl", "fj/sub/d.jsonl", "fj/sub/sub2/e.jsonl"]
    for name in names:
        write_jsonl(tmp_path / name, [name])
    monkeypatch.chdir(tmp_path)
    expected = names[2:] if "sub" in pattern else names
    assert sorted(Path(s.path).as_posix() for s in find_sources([pattern])) == expected


def test_zstd_frames_one_after_another_are_all_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(
        zst(lines_of(["a"])) + SKIPPABLE_FRAME + zst(lines_of(["b"])) + SKIPPABLE_FRAME
    )
    assert [text for text, _, _ in read_documents([str(path)], "text", stop)] == ["a", "b"]


COMPRESSED_FAULTS = {
    "zst truncated": (".zst", zst, lambda d: d[:-5]),
    "zst second frame truncated": (".zst", lambda d: zst(d) + zst(d), lambda d: d[:-3]),
    "zst corrupt": (".zst", zst, lambda d: d[:40] + b"\xff\xff\xff" + d[43:]),
    "zst is not zst": (".zst", bytes, lambda d: d),
    "gz truncated": (".gz", gzip.compress, lambda d: d[:-9]),
    "gz corrupt": (".gz", gzip.compress, lambda d: d[:40] + b"\xff\xff\xff" + d[43:]),
    "gz is not gz": (".gz", bytes, lambda d: d),
}


@pytest.mark.parametrize("fault", COMPRESSED_FAULTS)
def test_damaged_compressed_file_is_named_and_never_ends_quietly(tmp_path, fault):
    suffix, pack, damage = COMPRESSED_FAULTS[fault]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damage(pack(lines_of([f"document {i * i}" for i in range(5000)]))))
    with pytest.raises(UserError, match="cannot be read to its end") as caught:
        list(read_documents([str(path)], "text", stop))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_join_to_the_file_and_hold_whole_numbered_lines(tmp_path, block_bytes):
    # As much is read at once, so that lines are longer than a read.
    data = lines_of(["x" * (i % 40) for i in range(60)])[:-1]  # the last line has no end
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    blocks = list(iterate_blocks(Source(str(path), "a"), block_bytes))
    assert b"".join(block.data for block in blocks) == data
    line = 1
    for block in blocks[:-1]:
        assert block.data.endswith(b"\n")
        assert block.first_line == line
        line += block.data.count(b"\n")
    assert len(blocks) > 1 or block_bytes == 1 << 20


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(b'{"text": "ok"}\n{"text": "' + b"a" * (3 << 20)))
    with pytest.raises(UserError, match="longer than") as caught:
        list(iterate_blocks(Source(str(path), "a"), 1 << 20))
    assert caught.value.where == f"{path}:2"


def test_blank_lines_count_as_lines_but_not_as_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\n\n')
    documents = [(text, line) for text, _, line in read_documents([str(path)], "text", stop)]
    assert documents == [("a", 1), ("b", 4)]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"plain", "not valid JSON"),
        (b'{"text": "\\ud800 a"', "not valid JSON"),
        (b'{"text": "\\ud800", "x": NaN}', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 100000 + b'"\\ud800"', "not valid JSON"),
        (b'["a"]', "a list, not an object"),
        (b"3", "a number, not an object"),
        (b'{"content": "a", "meta": {}}', "no key 'text' .its keys: 'content', 'meta'"),
        (b'{"text": null}', "'text' is null, not a string"),
        (b'{"text": {"a": 1}}', "'text' is an object, not a string"),
        (b'{"text": true}', "'text' is a boolean, not a string"),
    ],
)
def test_bad_lines_say_what_is_wrong(tmp_path, raw, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + raw + b"\n")
    with pytest.raises(UserError, match=problem) as caught:
        list(read_documents([str(path)], "text", stop))
    assert caught.value.where == f"{path}:2"
    bad = []
    assert len(list(read_documents([str(path)], "text", bad.append))) == 1
    assert [(b.path, b.line) for b in bad] == [(str(path), 2)]


@pytest.mark.parametrize(
    ("escaped", "text", "replaced"),
    [
        (rb"a\ud809b", "a\ufffdb", 1),
        (rb"a\uDC00\uD800", "a\ufffd\ufffd", 2),
        (rb"\ud83d\ude00", "\U0001f600", 0),
        (rb"\ud83d\ude00 \ud83d", "\U0001f600 \ufffd", 1),
        (rb"\\ud809", r"\ud809", 0),
    ],
)
def test_lone_surrogates_become_the_replacement_character(escaped, text, replaced):
    parsed = parse_line(b'{"text": "' + escaped + b'"}', ["text"])
    assert not isinstance(parsed, str)
    assert (parsed.texts, parsed.replaced_surrogates) == ((text,), (replaced,))
