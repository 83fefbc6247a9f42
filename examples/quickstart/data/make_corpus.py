"""Build the quick start's corpus from Debian packages, byte for byte the same every time.

The file has the form of a SlimPajama shard: one JSON object a line, non-ASCII characters escaped,
zstd, the sub-sources shuffled together and named by SlimPajama's set names, so that the commands of
the quick start are the ones for the real data set.  Every text is in the public domain or under a
permissive licence; SOURCES.md holds the licences.

The packages are read without being installed:

    mkdir debs && cd debs
    apt-get download jargon-text dict-devil miscfiles sqlite3-doc postgresql-doc-15 \\
        python3.11-doc libpython3.11-stdlib
    cd .. && python make_corpus.py --debs debs

Another version of a package gives another corpus; the script says so when it sees one.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import zstandard

from litespark.utils.files import atomic_write

SHUFFLE_SEED = 20231123
ZSTD_LEVEL = 19  # the file lives in git, so size counts more than the two seconds it takes
MIN_NON_SPACE_CHARACTERS = 200  # SlimPajama drops shorter documents
MAX_DOCUMENT_CHARACTERS = 60_000  # one page must not be 1 % of the corpus
GROUP_CHARACTERS = 1200  # dictionary entries are joined up to this, about an encyclopedia's stub
MAX_SEEN_LINE_SHARE = 0.3  # a document with more lines seen before is boiler-plate
MIN_LINE_CHARACTERS = 40  # shorter lines repeat by chance

Files = dict[str, bytes]


class Document(NamedTuple):
    """One text with the SlimPajama set it is filed under."""

    set_name: str
    text: str


class Source(NamedTuple):
    """A Debian package: the version of the committed corpus, what to read, how, and how much."""

    version: str
    prefix: str
    extract: Callable[[Files], Iterator[Document]]
    max_bytes: int  # of text in each of its sets


class PageText(HTMLParser):
    """Collects the running text of a manual's HTML page: no menus, scripts, tables of contents.

    Args:
        skipped_classes: `class` attributes whose element is dropped with all it holds.
    """

    VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "area", "base"})
    SKIPPED = frozenset({"head", "script", "style", "svg", "form", "button"})
    HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
    LISTS = frozenset({"ul", "ol", "dl", "table"})
    LINES = frozenset({"div", "br", "tr", "li", "dt", "dd", "blockquote"})  # begin on a new line
    PARAGRAPHS = frozenset({"p", "pre"}) | HEADINGS  # have an empty line above

    def __init__(self, skipped_classes: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self._skipped_classes = skipped_classes
        self._skip_tag = ""
        self._skip_depth = 0
        self._pre_depth = 0
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element, or go one deeper in a skipped one."""
        if self._skip_depth:
            # Only the skipped element's own tag is counted: SQLite's pages leave <li> and <p> open.
            self._skip_depth += tag == self._skip_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in self.VOID and (tag in self.SKIPPED or classes & self._skipped_classes):
            self._skip_tag, self._skip_depth = tag, 1
            return
        self._pre_depth += tag == "pre"
        if tag in self.PARAGRAPHS:
            self._pieces.append("\n\n")
        elif tag in self.LINES or tag in self.LISTS:
            self._pieces.append("\n")
        elif tag in ("td", "th"):
            self._pieces.append("  ")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
            return
        self._pre_depth = max(0, self._pre_depth - (tag == "pre"))
        if tag in self.PARAGRAPHS or tag in self.LISTS:
            self._pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keep text; outside `pre` a run of white space is one space."""
        if not self._skip_depth:
            if not self._pre_depth:
                data = re.sub(r"\s+", " ", data)
                if not self._pieces or self._pieces[-1].endswith("\n"):
                    data = data.lstrip()
            if data:
                self._pieces.append(data)

    def text(self) -> str:
        """All text of the page."""
        return "".join(self._pieces)


def html_to_text(page: bytes, skipped_classes: frozenset[str]) -> str:
    """The running text of one HTML page."""
    parser = PageText(skipped_classes)
    parser.feed(page.decode("utf-8", "replace"))
    parser.close()
    return parser.text()


def tidy(text: str) -> str:
    """NFC, no trailing space, no control characters, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def grouped(entries: list[str]) -> Iterator[str]:
    """Neighbouring dictionary entries joined until a document has a useful length."""
    group: list[str] = []
    for entry in entries:
        group.append(entry.strip())
        if sum(map(len, group)) >= GROUP_CHARACTERS:
            yield "\n\n".join(group)
            group = []
    if group:
        yield "\n\n".join(group)


def jargon(files: Files) -> Iterator[Document]:
    """The Jargon File: essays as book chapters, the lexicon as encyclopedia articles."""
    text = gzip.decompress(files["usr/share/doc/jargon-text/jargon.txt.gz"]).decode("utf-8")
    text = re.sub(r"(?m)^ {3}", "", text.replace("\u00a0", " "))
    text = re.sub(r"(?m)^[┌├└][^\n]*\n", "", text).replace("│", " ")  # frames of tables
    body = text[text.index("Part I. Introduction") :]
    front, rest = body.split("Part II. The Jargon Lexicon", 1)
    lexicon, back = rest.split("Part III. Appendices", 1)
    for essay in re.split(r"(?m)^(?=(?:Chapter \d+|Appendix [A-Z])\. )", front + back):
        # The chapter on revisions is one long table: no running text.
        if essay.startswith(("Chapter", "Appendix")) and "Revision History" not in essay[:60]:
            for section in sections(essay, re.compile(r"(?m)^(?=[A-Z][^\n]{3,60}\n\n)")):
                yield Document("RedPajamaBook", section)
    for group in grouped(re.split(r"(?m)^(?=:[^:\n]+:)", lexicon)[1:]):
        yield Document("RedPajamaWikipedia", group)


def sections(text: str, heading: re.Pattern[str], target_characters: int = 6000) -> Iterator[str]:
    """A long text cut at headings into pieces of at least `target_characters`."""
    pieces: list[str] = []
    for piece in heading.split(text):
        pieces.append(piece)
        if sum(map(len, pieces)) >= target_characters:
            yield "".join(pieces)
            pieces = []
    yield "".join(pieces)


def devil(files: Files) -> Iterator[Document]:
    """Ambrose Bierce, The Devil's Dictionary (1911)."""
    text = gzip.decompress(files["usr/share/dictd/devil.dict.dz"]).decode("utf-8", "replace")
    text = text[text.index("PREFACE") :]
    for group in grouped(re.split(r"(?m)^(?=[A-Z][A-Z' -]{2,}(?:,|\.))", text)):
        yield Document("RedPajamaBook", group)


def us_founding(files: Files) -> Iterator[Document]:
    """The Declaration of Independence, and the Constitution by articles."""
    yield Document(
        "RedPajamaBook", gzip.decompress(files["usr/share/state/us-declaration.gz"]).decode()
    )
    constitution = gzip.decompress(files["usr/share/state/us-constitution.gz"]).decode()
    for section in sections(constitution, re.compile(r"(?m)^(?=Article |Amendment )")):
        yield Document("RedPajamaBook", section)


def sqlite(files: Files) -> Iterator[Document]:
    """SQLite's manual, one page a document, without its indexes and change logs."""
    skipped = frozenset({"nosearch", "fancy_toc", "imgcontainer"})
    listing = re.compile(
        r"crossref|index|requirements|syntax|sitemap|capi3ref|changes|chronology|news|doclist"
        r"|download|toc|books|press|consortium|search|copyright|vtablist|shortnames|keyword|famous"
    )
    for path, page in files.items():
        name = path.removeprefix("usr/share/doc/sqlite3/")
        if name.endswith(".html") and "/" not in name and not listing.search(name):
            text = html_to_text(page, skipped)
            text = re.sub(r"This page last modified on.*", "", text)
            yield Document("RedPajamaCommonCrawl", text)


def postgresql(files: Files) -> Iterator[Document]:
    """PostgreSQL's manual, one page a document, without release notes and indexes."""
    skipped = frozenset({"navheader", "navfooter", "toc", "indexterm"})
    listing = re.compile(r"release|index|appendix|legalnotice|contrib-.*-list|biblio|features")
    for path, page in files.items():
        name = path.rsplit("/", 1)[-1]
        if name.endswith(".html") and not listing.search(name):
            yield Document("RedPajamaCommonCrawl", html_to_text(page, skipped))


RST_DROPPED_LINES = re.compile(
    r"(?m)^ *(?:"
    r"\.\. (?:index|_|\w*author|module|highlight|currentmodule|include|testsetup)[^\n]*"
    r"|:(?:synopsis|noindex|platform|annotation|maxdepth|deprecated|hidden|name|class)[^\n]*"
    r"|(?:single|pair|triple|builtin|statement|keyword|object|operator|module|exception): [^\n]*"
    r")\n"
)
RST_OBJECTS = r"(?m)^( *)\.\. (?:\w+:)?(?:function|method|class\w*|data|attribute|exception):: "


def rst_to_text(source: str) -> str:
    """Sphinx source without its machinery: directives' markers, labels, roles, index entries."""
    source = RST_DROPPED_LINES.sub("", source)
    source = re.sub(r":pep:`([^`]+)`", r"PEP \1", source)
    source = re.sub(r":[a-z:]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", source)
    source = re.sub(RST_OBJECTS, r"\1", source)
    source = re.sub(r"(?m)^( *)\.\. (\w+):: *", lambda m: f"{m[1]}{m[2].capitalize()}: ", source)
    source = re.sub(r"(?m)^\.\. [^\n]*\n(?:   [^\n]*\n|\n(?=   ))*", "", source)  # comments
    return re.sub(r"``?([^`\n]+)``?", r"\1", source)


def python_manual(files: Files) -> Iterator[Document]:
    """Python's manual: pages as web text, the FAQ's questions as questions and answers."""
    for path, raw in files.items():
        folder, name = path.split("_sources/", 1)[1].rpartition("/")[::2]
        source = raw.decode("utf-8")
        if folder == "faq" and name != "index.rst.txt":
            parts = re.split(r"(?m)^([^\n]+\?)\n[-=^~]+\n", source)
            for question, answer in zip(parts[1::2], parts[2::2], strict=True):
                # The heading of the next group of questions may hang on to an answer's end.
                answer = re.sub(r"\n[^\n]+\n[-=]{4,}\n\s*\Z", "\n", rst_to_text(answer))
                question = rst_to_text(question)
                yield Document("RedPajamaStackExchange", f"Q: {question}\n\nA: {answer.strip()}")
        elif folder in ("tutorial", "howto", "library", "reference") and name != "index.rst.txt":
            yield Document("RedPajamaC4", rst_to_text(source))


def python_sources(files: Files) -> Iterator[Document]:
    """Modules of Python's standard library that carry no licence of their own."""
    own_notice = re.compile(rb"copyright|licen[cs]e|\(c\)", re.IGNORECASE)
    skipped = re.compile(r"/(?:pydoc_data|encodings|lib2to3|idlelib|__phello__|ensurepip)/")
    for path, raw in files.items():
        if path.endswith(".py") and not own_notice.search(raw) and not skipped.search(path):
            yield Document("RedPajamaGithub", raw.decode("utf-8"))


SOURCES: dict[str, Source] = {
    "jargon-text": Source("4.4.7-4.1", "usr/share/doc/", jargon, 2_000_000),
    "dict-devil": Source("1.0-13.1", "usr/share/dictd/", devil, 1_000_000),
    "miscfiles": Source("1.5+dfsg-4", "usr/share/state/", us_founding, 100_000),
    "sqlite3-doc": Source("3.40.1-2+deb12u2", "usr/share/doc/sqlite3/", sqlite, 1_000_000),
    "postgresql-doc-15": Source(
        "15.20-0+deb12u1", "usr/share/doc/postgresql-doc-15/html/", postgresql, 1_200_000
    ),
    "python3.11-doc": Source(
        "3.11.2-6+deb12u9", "usr/share/doc/python3.11/html/_sources/", python_manual, 1_400_000
    ),
    "libpython3.11-stdlib": Source(
        "3.11.2-6+deb12u9", "usr/lib/python3.11/", python_sources, 900_000
    ),
}


def read_package(debs: Path, name: str, source: Source) -> Files:
    """The package's regular files below the source's prefix, by path, in order of path."""
    found = sorted(debs.glob(f"{name}_*.deb"))
    if len(found) != 1:
        raise SystemExit(
            f"{debs}: {len(found)} files {name}_*.deb, expected 1. "
            f"Fetch it with: apt-get download {name}"
        )
    field = subprocess.run(
        ["dpkg-deb", "-f", str(found[0]), "Version"], check=True, capture_output=True, text=True
    )
    if field.stdout.strip() != source.version:
        print(
            f"note: {name} is version {field.stdout.strip()}, the committed corpus was made from "
            f"{source.version}: the result will differ"
        )
    archive = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(found[0])], check=True, capture_output=True
    )
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and path.startswith(source.prefix):
                files[path] = content.read()
    return dict(sorted(files.items()))


def select(documents: Iterator[Document], max_bytes: int, seen_lines: set[str]) -> list[Document]:
    """Documents of a fair length that are no repeats, at random up to `max_bytes` of each set."""
    candidates = [Document(name, tidy(text)) for name, text in documents]
    random.Random(SHUFFLE_SEED).shuffle(candidates)
    chosen: list[Document] = []
    num_bytes: Counter[str] = Counter()
    for document in candidates:
        text = document.text
        size = len(text.encode())
        if sum(not c.isspace() for c in text) < MIN_NON_SPACE_CHARACTERS:
            continue
        if len(text) > MAX_DOCUMENT_CHARACTERS or num_bytes[document.set_name] + size > max_bytes:
            continue
        lines = [line for line in text.splitlines() if len(line) >= MIN_LINE_CHARACTERS]
        repeated = sum(line in seen_lines for line in lines)
        if repeated > MAX_SEEN_LINE_SHARE * len(lines):
            continue
        seen_lines.update(lines)
        chosen.append(document)
        num_bytes[document.set_name] += size
    return chosen


def write_corpus(documents: list[Document], output: Path) -> str:
    """Write the shard at once or not at all; returns the SHA-256 of the uncompressed lines."""
    lines = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": set_name}}) + "\n"
        for set_name, text in documents
    ]
    raw = "".join(lines).encode("ascii")
    # One thread: with several, zstd cuts the stream into jobs and the bytes depend on their number.
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, threads=0)
    with atomic_write(output) as file:
        file.write(compressor.compress(raw))
    return hashlib.sha256(raw).hexdigest()


def print_table(rows: list[tuple[str, str, int, int]]) -> None:
    """The documents and bytes by package and set, as the Markdown table in SOURCES.md."""
    print("| package | set | documents | bytes of text |\n|---|---|---:|---:|")
    for package, set_name, num_documents, num_bytes in rows:
        print(f"| {package} | {set_name} | {num_documents} | {num_bytes} |")
    print(f"| all | | {sum(r[2] for r in rows)} | {sum(r[3] for r in rows)} |")


def main() -> None:
    """Read the packages, choose, shuffle, write, and say what was written."""
    parser = argparse.ArgumentParser(description="Build corpus.jsonl.zst from Debian packages.")
    parser.add_argument("--debs", type=Path, required=True, help="folder with the .deb files")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("corpus.jsonl.zst"))
    args = parser.parse_args()
    documents: list[Document] = []
    rows: list[tuple[str, str, int, int]] = []
    seen_lines: set[str] = set()
    for name, source in SOURCES.items():
        extracted = source.extract(read_package(args.debs, name, source))
        chosen = select(extracted, source.max_bytes, seen_lines)
        documents += chosen
        for set_name in sorted({document.set_name for document in chosen}):
            texts = [d.text for d in chosen if d.set_name == set_name]
            rows.append((name, set_name, len(texts), sum(len(t.encode()) for t in texts)))
    random.Random(SHUFFLE_SEED).shuffle(documents)
    checksum = write_corpus(documents, args.output)
    print_table(rows)
    print(f"{args.output}: {args.output.stat().st_size} bytes; SHA-256 of the lines {checksum}")


if __name__ == "__main__":
    main()
