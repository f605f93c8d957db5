"""The reader of tables: every line of a file is read, set aside with its place, or blank."""

import csv
import datetime
import decimal
import io
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pabee_jax.data import tables
from pabee_jax.errors import InputError


def rows_of(path, content=None, texts=("text",), **columns):
    """Return the rows of a file whose lines are all accounted for."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = tables.open_table(path, texts, **columns)
    rows = list(table.rows())
    if rows and rows[0].unit == "line":
        newline = "" if path.suffix == ".csv" else "\n"
        with path.open(newline=newline, encoding="utf-8-sig", errors="replace") as file:
            lines = dict(enumerate(file, start=1))
        covered = [line for row in rows for line in range(row.first, row.last + 1)]
        header = range(1, rows[0].first)
        assert sorted(covered) == covered, "a line belongs to two rows"
        missing = lines.keys() - set(covered) - set(header)
        assert not any(lines[line].strip() for line in missing), "a line was lost"
    return rows


def texts_of(rows):
    return [row.cells["text"] for row in rows if not row.problem]


def problems_of(rows):
    return {row.place: row.problem for row in rows if row.problem}


TEXTS = [f"a film of {row} minutes" for row in range(64)]


def csv_lines(**replaced):
    lines = ["id,text", *(f"{row},{text}" for row, text in enumerate(TEXTS))]
    for row, line in replaced.items():
        lines[int(row[1:]) + 1] = line
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("replaced", "bad_rows"),
    [
        ({"r3": '3,"never closed'}, [3]),
        ({"r3": '3,"never closed', "r37": '37,"nor this'}, [3, 37]),
        ({"r3": '3,"', "r40": '40,"', "r63": '63,"'}, [3, 40, 63]),
        ({"r3": '3,"runs away', "r60": '60,and closes after 5"'}, [3]),
        ({"r3": '3,"runs away', "r60": '60,closes",with too many cells'}, [3, 60]),
        ({"r3": '3,"bad "film"'}, [3]),
        ({"r3": '3,"a","b"'}, [3]),
        ({"r0": '"0,a', "r20": '20,""'}, [0, 20]),
    ],
)
def test_a_quotation_mark_that_is_not_closed_costs_one_row(tmp_path, replaced, bad_rows):
    rows = rows_of(tmp_path / "rows.csv", csv_lines(**replaced))
    expected = [text for row, text in enumerate(TEXTS) if row not in bad_rows]
    if "r60" in replaced and 60 not in bad_rows:
        expected[expected.index(TEXTS[60])] = 'and closes after 5"'
    assert texts_of(rows) == expected
    assert list(problems_of(rows)) == [f"line {row + 2}" for row in bad_rows]


def test_an_open_quotation_mark_does_not_read_a_large_file_to_its_end(tmp_path):
    """The lines that follow look like rows, so the search for the end of the cell stops."""
    content = csv_lines(r3='3,"never closed') + "7,a film\n" * 50_000
    first = next(row for row in rows_of(tmp_path / "rows.csv", content) if row.problem)
    assert first.place == "line 5" and "look like rows" in first.problem
    table = tables.open_table(tmp_path / "rows.csv", ["text"])
    bytes_read = next(row.bytes_read for row in table.rows() if row.problem)
    assert bytes_read < 50_000


@pytest.mark.parametrize("cell", ["one\ntwo\nthree", "1, a\n2, b\n3, c\n4, d", "a\n\n\n\n\n\n\nb"])
def test_a_quoted_cell_of_several_lines_is_one_cell(tmp_path, cell):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", "text"), (1, "x"), (2, cell), (3, "y")])
    rows = rows_of(tmp_path / "rows.csv", file.getvalue())
    assert texts_of(rows) == ["x", cell, "y"]
    assert rows[1].place == f"lines 3 to {3 + cell.count(chr(10))}"


any_cell = st.text(st.sampled_from('ab ,;"\\\n\t\u2028\x85\0é'), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(any_cell, any_cell), min_size=1, max_size=4))
def test_what_the_csv_module_writes_is_read_as_it_was(tmp_path_factory, cells):
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "other"), *cells])
    rows = rows_of(path, texts=(), others=["text", "other"])
    assert [(row.cells["text"], row.cells["other"]) for row in rows] == cells


@pytest.mark.parametrize(
    ("content", "texts", "message"),
    [
        ('id,text\r\n1,"a ""b"""\r\n2,c\r\n', ['a "b"', "c"], ""),
        ("id,text\r1,a\r2,b\r", ["a", "b"], ""),
        ("\ufeffid,text\n1,a\n\n2,b\n\n\n", ["a", "b"], ""),
        ("\n\nid,text\n1,a\n", ["a"], ""),
        ("text\na\n\nb\n", ["a", "b"], ""),
        ("id,text\n1,a\0b\n", ["a\0b"], ""),
        ("id,text\n1," + "x" * 200_000 + "\n", ["x" * 200_000], ""),
        ("v1,text,,,\n1,a,,,\n2,b,,,\n", ["a", "b"], ""),
        ("text,n,n\na,1,2\n", ["a"], ""),
        (b"text,n\xe9\na,caf\xe9\n", ["a"], ""),
        ("id;text\n1;a, b\n", ["a, b"], "separated by semicolons, not by commas"),
        ("text,a;b;c\na,1\n", ["a"], ""),
        ("id\ttext\n1\ta, b\n", ["a, b"], "separated by tabs, not by commas"),
        # As Spark writes it.
        (
            'id,text\n1,"a \\"film\\", good"\n2,C:\\new\\dir\n3,"\\\\ and \\"x\\\\\\""\n4,b\n',
            ['a "film", good', "C:\\new\\dir", '\\ and "x\\"', "b"],
            "escaped by",
        ),
        # RFC 4180, where a backslash is a character.
        ('id,text\n1,"C:\\dir\\"\n2,"a ""b"", c"\n', ["C:\\dir\\", 'a "b", c'], ""),
        ('id,text\n1,a \\"b\\"\n', ['a \\"b\\"'], ""),
    ],
)
def test_dialects_of_csv(tmp_path, caplog, content, texts, message):
    rows = rows_of(tmp_path / "rows.csv", content)
    assert texts_of(rows) == texts and not problems_of(rows)
    assert [message in text for text in caplog.messages] == ([True] if message else [])


QUOTING = {"minimal": csv.QUOTE_MINIMAL, "all": csv.QUOTE_ALL, "strings": csv.QUOTE_NONNUMERIC}
QUOTED_TEXTS = ['"Yes"', 'She said "yes"', "plain", "a\tb", "two\nlines", '"', 'x""y']


@pytest.mark.parametrize("quoting", QUOTING)
@pytest.mark.parametrize("texts", [QUOTED_TEXTS, ['"Yes"', "b"], ["a\tb", "c"], ["two\nlines"]])
def test_a_tsv_file_with_quoted_cells_is_read_as_it_was_written(tmp_path, quoting, texts, caplog):
    """pandas' `to_csv(sep="\\t")` writes the same file."""
    with (tmp_path / "rows.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=QUOTING[quoting], lineterminator="\n")
        writer.writerows([("text", "label"), *((text, 1) for text in texts)])
    assert texts_of(rows_of(tmp_path / "rows.tsv")) == texts
    assert [message.endswith("are read as in CSV") for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    "texts",
    [
        ['"Yes"', 'he said "no"'],
        ['"Yes" he said'],
        ['"never closed', "b"],
        ['"tis nothing', 'a "foo"', 'bar"'],
        ['"tis nothing', 'bar"'],
        ['"'],
    ],
)
def test_quotation_marks_of_other_tsv_files_are_text(tmp_path, texts, caplog):
    content = "".join(f"{text}\t0\n" for text in ("text", *texts))
    rows = rows_of(tmp_path / "rows.tsv", content.replace("text\t0", "text\tlabel", 1))
    assert texts_of(rows) == texts and not problems_of(rows)
    assert [message.endswith("are read as text") for message in caplog.messages] == [True]


def test_json_lines_may_lack_keys(tmp_path):
    lines = ['{"id": 1}', "", '{"text": "a"}', '{"text": null}', '{"text": "b", "note": [1]}']
    rows = rows_of(tmp_path / "rows.jsonl", "\n".join(lines), others=["note"])
    assert texts_of(rows) == ["a", "b"]
    assert [row.cells.get("note") for row in rows if not row.problem] == [None, [1]]
    missing = "the text in column 'text' is missing or null"
    assert problems_of(rows) == {"line 1": missing, "line 4": missing}
    with pytest.raises(InputError, match="no column 'body': it has 'id', 'text', 'note'"):
        tables.open_table(tmp_path / "rows.jsonl", ["body"])


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_objects_is_read(tmp_path, indent):
    records = [{"text": "a", "n": 2**70}, {"n": 1}, {"text": "b", "n": float("nan")}]
    rows = rows_of(tmp_path / "rows.json", json.dumps(records, indent=indent), others=["n"])
    assert texts_of(rows) == ["a", "b"] and list(problems_of(rows)) == ["row 2"]
    assert rows[0].cells["n"] == 2**70


def test_only_repeated_names_that_are_asked_for_are_a_problem(tmp_path):
    content = '{"text": "a", "n": 1, "n": 2}\n{"text": "b", "text": "c"}\n{"x": {"n": 1, "n": 2}}\n'
    rows = rows_of(tmp_path / "rows.jsonl", content)
    assert texts_of(rows) == ["a"]
    assert "'text' occurs twice" in problems_of(rows)["line 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,text\na,b\n", "more than one column 'text'"),
        ("a.csv", "\n\n", "is empty"),
        ("a.csv", "id;body\n1;a\n", "no column 'text': it has 'id', 'body'"),
        ("a.csv", 'text,"id\n1,2\n', "line 1: malformed CSV"),
        ("a.csv", "text,id\na,1\n".encode("utf-16"), "line 1: not UTF-8 text but UTF-16"),
        ("a.tsv", "text\tid\na\t1\n".encode("utf-16-le"), "line 1: not UTF-8 text but UTF-16"),
        ("a.jsonl", "nothing\n", "line 1: malformed JSON"),
        ("a.json", "[]", "is empty"),
        ("a.txt", "text", "none of the known extensions"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path / name, content)


def test_bytes_that_are_not_utf8_are_a_problem_of_their_row(tmp_path):
    rows = rows_of(tmp_path / "rows.csv", b"id,text\n1,a\n2,caf\xe9\n\xe9,b\n")
    assert texts_of(rows) == ["a", "b"], "the id was not asked for"
    assert "not UTF-8" in problems_of(rows)["line 3"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
def test_a_folder_of_parquet_files_is_read_in_the_order_of_its_files(tmp_path, kind):
    folder = tmp_path / "x.parquet"
    (folder / "_temporary").mkdir(parents=True)
    for part, texts in enumerate([["a", "b"], [], ["c", None]]):
        array = pyarrow.array(texts, kind)
        parquet.write_table(
            pyarrow.table({"text": array}), folder / f"part-0000{part}-1f.snappy.parquet"
        )
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000-1f.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_temporary" / "part-00003.parquet").write_bytes(b"unfinished")
    rows = rows_of(folder)
    assert texts_of(rows) == ["a", "b", "c"] and list(problems_of(rows)) == ["row 4"]
    assert rows[-1].bytes_read == tables.open_table(folder, ["text"]).size
    (tmp_path / "empty.parquet").mkdir()
    with pytest.raises(InputError, match="a folder without Parquet files"):
        tables.open_table(tmp_path / "empty.parquet", ["text"])


def test_parquet_values_that_python_does_not_have_are_text(tmp_path):
    dates = pyarrow.array([0, 4_000_000], pyarrow.int32()).cast(pyarrow.date32())
    times = [datetime.datetime(2026, 1, 2, 3, 4, 5), None]
    prices = [decimal.Decimal("1.50"), decimal.Decimal("2.00")]
    table = pyarrow.table({"text": ["a", "b"], "date": dates, "time": times, "price": prices})
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = rows_of(tmp_path / "x.parquet", others=["date", "time", "price"])
    assert [row.cells["time"] for row in rows] == times
    assert [row.cells["price"] for row in rows] == prices
    assert rows[0].cells["date"] == "1970-01-01" and rows[1].cells["date"].startswith("12921")


@pytest.mark.parametrize("empty", ["text", "pair", "label"])
def test_an_empty_cell_of_either_text_or_of_the_label_is_a_problem(tmp_path, empty):
    cells = {"text": "a", "pair": "b", "label": "c", "note": ""}
    lines = [cells, cells | {empty: " \t"}, cells | {empty: None}]
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    options = dict(texts=("text", "pair"), labels=["label"], others=["note"])
    rows = rows_of(tmp_path / "rows.jsonl", content, **options)
    problems = problems_of(rows)
    assert list(problems) == ["line 2", "line 3"] and texts_of(rows) == ["a"]
    assert all(f"column '{empty}' is " in problem for problem in problems.values())
