"""Lines and rows of text files: what a writer wrote is read again, and bad rows are named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import moezoo
from moezoo.adapters.upcycle.calibration import read_calibration
from moezoo.text_files import lines, paragraphs, rows, texts
from moezoo.training.corpus import file_documents
from moezoo.training.tasks import read_pairs

# What str.splitlines takes for the end of a line, a quote, a byte order mark in the middle, NUL.
ODD = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e \0 '\" x\ufeff , \t"
BOM = b"\xef\xbb\xbf"
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.just(ODD)
BROKEN = ANY | st.sampled_from(["a\nb", "a\r\nb", "a\rb", '"\n"', "\n", "\r", '"', ""])
PAIRS = st.lists(st.tuples(BROKEN, BROKEN), max_size=5)
EDGES = st.tuples(st.booleans(), st.sampled_from(["\n", "\r\n"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


def written(path: Path, content: str, *, bom: bool) -> Path:
    path.write_bytes(BOM * bom + content.encode())
    return path


@given(pairs=PAIRS, edges=EDGES, quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_a_csv_file_gives_what_the_csv_module_wrote(
    folder: Path, pairs: list[tuple[str, str]], edges: tuple[bool, str], quoting: int
) -> None:
    content = io.StringIO(newline="")
    # "\r\n" as the end makes older writers quote a lone "\r", which they must.
    end = edges[1] if quoting == csv.QUOTE_ALL else "\r\n"
    csv.writer(content, quoting=quoting, lineterminator=end).writerows([("s", "t"), *pairs])
    path = written(folder / "a.csv", content.getvalue(), bom=edges[0])
    assert [(row["s"], row["t"]) for _, row in rows(path)] == pairs
    assert not pairs or read_pairs(path, source="s", target="t") == pairs


@given(pairs=st.lists(st.tuples(ANY, ANY), max_size=5), edges=EDGES)
def test_a_tsv_file_gives_its_cells_letter_by_letter(
    folder: Path, pairs: list[tuple[str, str]], edges: tuple[bool, str]
) -> None:
    clean = [tuple("".join(c for c in t if c not in "\t\r\n") for t in pair) for pair in pairs]
    content = edges[1].join(map("\t".join, [("s", "t"), *clean]))
    path = written(folder / "a.TSV", content, bom=edges[0])
    assert [(row["s"], row["t"]) for _, row in rows(path)] == clean


@given(pairs=PAIRS, edges=EDGES, ascii_only=st.booleans())
def test_a_jsonl_file_gives_what_json_wrote(
    folder: Path, pairs: list[tuple[str, str]], edges: tuple[bool, str], ascii_only: bool
) -> None:
    made = [json.dumps({"s": s, "t": t}, ensure_ascii=ascii_only) for s, t in pairs]
    path = written(folder / "a.jsonl", "".join(line + edges[1] for line in made), bom=edges[0])
    assert [(row["s"], row["t"]) for _, row in rows(path)] == pairs
    assert [number for number, _ in rows(path)] == list(range(1, len(pairs) + 1))


@given(
    found=st.lists(ANY | st.just("a\rb"), min_size=1, max_size=5), edges=EDGES, last=st.booleans()
)
@example(found=[ODD, ""], edges=(True, "\r\n"), last=True)
def test_a_line_of_text_ends_at_the_line_feed_alone(
    folder: Path, found: list[str], edges: tuple[bool, str], last: bool
) -> None:
    found = [text.replace("\n", "").rstrip("\r") for text in found]
    content = edges[1].join(found) + edges[1] * last
    path = written(folder / "a.txt", content, bom=True)
    # Whether the last line has an end or not, it is the same text.
    wanted = found if last or found[-1] else found[:-1]
    assert list(lines(path)) == list(enumerate(wanted, 1))
    assert list(texts(path, field="none")) == list(lines(path))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "txt"])
def test_every_reader_takes_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    said = ['a "stray\u2028 quote', "two\x85 lines"]
    made = {
        "csv": 'text\n"a ""stray\u2028 quote"\ntwo\x85 lines\n',
        "tsv": 'text\na "stray\u2028 quote\ntwo\x85 lines\n',
        "jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in said),
        "txt": "\n\n".join(said) + "\n",
    }
    path = written(tmp_path / f"a.{suffix}", made[suffix], bom=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    encode = moezoo.ByteTokenizer().encode
    assert [document.text for document in file_documents([path])] == said
    assert [text for _, text in texts(path, field="text") if text] == said
    assert read_calibration(path, tmp_path).sequences == [encode(text) for text in said]


def test_fields_are_of_any_length_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    long, before = "x\n" * 200_000, csv.field_size_limit()
    path = written(tmp_path / "a.csv", f'text,n\n"{long}",1\n', bom=False)
    reading = rows(path)
    assert next(reading)[1] == {"text": long, "n": "1"}
    assert csv.field_size_limit() == before
    (tmp_path / "a.tsv").write_text(f"text\n{'y' * 400_000}\n")
    assert [len(text) for _, text in texts(tmp_path / "a.tsv", field="text")] == [400_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", 'text\na\n\n""\nb\n'), ("a.tsv", "\ntext\r\na\r\n\r\n\r\nb\r\n")],
)
def test_an_empty_cell_in_a_table_of_one_column_is_a_row(
    name: str, content: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content, bom=False)
    assert [text for _, text in texts(path, field="text")] == ["a", "", "", "b"]
    wide = "text,n\n\na,1\n".replace(",", "," if name == "a.csv" else "\t")
    path = written(tmp_path / f"wide-{name}", wide, bom=False)
    assert list(rows(path)) == [(3, {"text": "a", "n": "1"})]


def test_paragraphs_lie_between_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\r\n one\r\ntwo\x0c\r\n \t\n\n\nthree\x85four", bom=True)
    assert list(paragraphs(path)) == [" one\ntwo\x0c", "three\x85four"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_an_empty_file_has_no_rows_and_is_refused_where_some_are_needed(
    name: str, tmp_path: Path
) -> None:
    for content in (b"", BOM, b"\n\r\n", b"text,t\n" if name == "a.csv" else b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(moezoo.MoezooError, match="no text found"):
            file_documents([tmp_path / name])
        with pytest.raises(moezoo.MoezooError, match="no pairs in it"):
            read_pairs(tmp_path / name, source="s", target="t")


WRONG = [
    ("a.csv", b's,t\n"a\n\nb",c\n1,2,3\n', "line 5 has another number.*expected 2, found 3"),
    ("a.csv", b"s,t\n\n1\n", "line 3 has another number.*expected 2, found 1"),
    ("a.tsv", b's\tt\n"a\tb"\tc\n', "line 2 has another number.*expected 2, found 3"),
    ("a.csv", b's,t\n1,2\n"never closed,2\n3,4\n', "the row of line 3: unexpected end of data"),
    ("a.csv", b's,t\n"closed"early,2\n', "the row of line 2: ',' expected after '\"'"),
    ("a.csv", b"s,t,s\n1,2,3\n", "the header has the column 's' twice"),
    ("a.csv", b"s,t\n1,2\n\xff,3\n", "line 3 is not UTF-8 text: invalid start byte. Save"),
    ("a.jsonl", b'{"s": "1", "t": "2"}\n\n{\n', "line 3 is not JSON: .*an object per line"),
    ("a.jsonl", b'{"s": "1", "t": "2"}\n[1]\n', "line 2 is not a JSON object"),
    ("a.jsonl", b'{"s": "1", "t": "2", "s": "3"}\n', "line 1 .* field 's' is there twice"),
    ("a.jsonl", b'{"s": "1", "t": "\0"}\n', "line 1 is not JSON: Invalid control character"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ("a.jsonl", b'{"s": "1", "t": 2}\n', "line 1 has no text 't'"),
    ("a.jsonl", b'{"s": "1", "t": "\\ud800"}\n', "line 1: 't' holds half of a surrogate pair"),
    ("a.csv", b'"s\n1",t,u\n"x\ny",2,3\n', "line 3 has no text 's'"),
    ("a.csv", b"s,t\0\n1,2\n", "line 2 has no text 't'"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_a_wrong_row_is_named_by_its_line_in_the_file(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(moezoo.MoezooError, match=message) as caught:
        read_pairs(tmp_path / name, source="s", target="t")
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) - len(str(tmp_path)) < 200


@pytest.mark.parametrize("name", ["missing.csv", "", "nul\0.jsonl"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(moezoo.MoezooError, match="cannot be read|null byte"):
        read_pairs(tmp_path / name, source="s", target="t")


def test_a_row_is_there_before_the_file_ends(tmp_path: Path) -> None:
    endings: Sequence[bytes] = (b"a,b\n", b'{"x": "y"}\n', b"a\tb\n")
    for name, good in zip(("a.csv", "a.jsonl", "a.tsv"), endings, strict=True):
        (tmp_path / name).write_bytes(good * 3 + b"\xff" * 9)
        reading = rows(tmp_path / name)
        numbers = [next(reading)[0], next(reading)[0]]
        assert all(a + 1 == b for a, b in pairwise(numbers))


def test_prompts_that_are_too_large_are_refused_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([["x" * 2**20]]))
    with pytest.raises(moezoo.MoezooError, match="too large for prompts"):
        read_calibration(tmp_path / "a.json", tmp_path)
