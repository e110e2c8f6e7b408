"""A table is read as people write it, and is written back unchanged."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.tables import Table, read_table, write_table


@pytest.fixture
def table_of(tmp_path):
    """Read text, or bytes, as a file."""

    def read(content):
        path = tmp_path / "jobs.csv"
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(data)
        return read_table(path)

    return read


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4\n",
        "a,b\r\n1,2\r\n3,4\r\n",
        "a,b\r1,2\r3,4",
        "\ufeffa,b\n1,2\n3,4",
        "a;b\n1;2\n3;4\n",
        "a\tb\n1\t2\n3\t4\n",
        '"a","b"\n"1","2"\n"3","4"\n',
        "\n\na , b\n1,2\n\n3,4\n\n",
        "a,b\n1,2,,\n3,4,\n",
    ],
)
def test_all_forms_of_a_table_are_read(table_of, text):
    table = table_of(text)
    assert table.columns == ("a", "b")
    assert table.rows == [("1", "2"), ("3", "4")]
    assert not table.problems


def test_a_written_table_is_read_as_it_was(table_of, tmp_path):
    text = 'a;b; c ;a\n"x;y";" 1";"say ""ä""";"two\nlines"\n;;;\n'
    table = table_of(text)
    write_table(table, tmp_path / "again.csv")
    again = read_table(tmp_path / "again.csv")
    assert (again.header, again.rows) == (table.header, table.rows)
    assert again.header == ("a", "b", " c ", "a")
    assert again.rows[0] == ("x;y", " 1", 'say "ä"', "two\nlines")
    assert (tmp_path / "again.csv").read_text().startswith("a;b; c ;a\n")


def test_a_delimiter_inside_a_name_is_no_delimiter(table_of):
    assert table_of("a,b (x;y;z)\n1,2\n").columns == ("a", "b (x;y;z)")
    assert table_of('a;b;"c, d, e"\n1;2;3\n').columns == ("a", "b", "c, d, e")
    assert table_of("tok/s;GiB (peak)\n1;2\n").columns == ("tok/s", "GiB (peak)")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=4), st.sampled_from(",;\t"))
def test_any_text_survives_a_file(rows, delimiter):
    table = Table(name="t", columns=("a", "b"), rows=rows, delimiter=delimiter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        write_table(table, path)
        again = read_table(path)
    assert (again.columns, again.rows) == (table.columns, rows)
    assert not again.problems


def test_a_blank_line_is_a_blank_cell_of_a_single_column(table_of):
    assert table_of("a\n1\n\n3\n").rows == [("1",), ("",), ("3",)]


def test_a_row_of_the_wrong_length_is_noted(table_of):
    table = table_of("a,b,c\n1,2,3\n1,2\n1,000,2,3\n")
    assert table.rows == [("1", "2", "3"), ("1", "2", ""), ("1", "000", "2")]
    assert list(table.problems) == [1, 2]
    assert "has 2 cells, but the header has 3 columns" in table.problems[1]
    assert "has 4 cells" in table.problems[2]


@pytest.mark.parametrize("line", ['"open,2', '"x" y,2', '1,"open'])
def test_a_wrong_quote_costs_one_row(table_of, line):
    table = table_of(f'a,b\n"1",2\n{line}\n\n"3, 4",5\n')
    assert table.rows == [("1", "2"), tuple(line.split(",")), ("3, 4", "5")]
    assert list(table.problems) == [1]
    assert "close each quote" in table.problems[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty; its first line must name the columns"),
        ("\n \r\n", "is empty"),
        (b"\xff\xfea\x00,\x00", "is not UTF-8: byte 0"),
        ("größe\n".encode("latin-1"), 'save it as "CSV UTF-8"'),
        (b"a,b\n1,\x00\n", "zero bytes"),
    ],
)
def test_what_is_no_table_is_refused(table_of, content, says):
    with pytest.raises(ValueError, match=says):
        table_of(content)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "nothing.csv")


def test_columns_that_are_read_must_be_unique():
    table = Table(name="t.csv", columns=("a", "b", "a", "b"), rows=[])
    with pytest.raises(ValueError, match=r"t.csv has more than one column a, b; keep"):
        table.require_unique(("a", "b", "c"))
    table.require_unique(("c",))
