"""Captions are read in the forms that people and programs write; an empty one is none."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from training.data.captions import match_captions, read_caption_beside, read_captions
from turbotalk_core.errors import RequestError

BOM = b"\xef\xbb\xbf"


class TestTables:
    def test_both_tables_say_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('file,caption,rest\nx/a.mp4,"A woman, speaking",1\n')
        (tmp_path / "a.jsonl").write_text(
            '{"file": "x/a.mp4", "caption": "A woman, speaking "}\n\n'
        )
        for name in ("a.csv", "a.jsonl"):
            assert read_captions(tmp_path / name) == {"x/a.mp4": "A woman, speaking"}

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.csv", ""),
            ("a.csv", "name,caption\na,b\n"),
            ("a.csv", "file,text\na,b\n"),
            ("a.csv", "sep=;\nfile;caption\na;b\n"),
            ("a.jsonl", "{\n"),
            ("a.jsonl", "[1]\n"),
            ("a.jsonl", '{"file": "a.mp4"}\n'),
            ("a.json", "[" * 100_000),
        ],
    )
    def test_other_tables_are_refused(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(RequestError, match="columns file and caption"):
            read_captions(tmp_path / name)

    @pytest.mark.parametrize("name", ["nowhere.csv", "."])
    def test_a_table_that_is_no_file_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(RequestError, match="cannot read captions from"):
            read_captions(tmp_path / name)

    @pytest.mark.parametrize("mark", [b"", BOM])
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.csv", "file,caption\r\nü.mp4,Zoë\r\n"),
            ("a.csv", "File; Caption \nü.mp4;Zoë\n\n"),
            ("a.tsv", "caption\tother\tfile\nZoë\t\tü.mp4\n"),
            ("a.csv", '"file","caption"\n"./ü.mp4"," Zoë"\n'),
            ("a.jsonl", '{"file": "ü.mp4", "caption": "Zoë", "n": 1}\r\n'),
            ("a.json", '[\n {"file": "ü.mp4",\n "caption": "Zoë"}\n]'),
        ],
    )
    def test_every_form_is_read_with_and_without_a_mark(
        self, tmp_path: Path, name: str, text: str, mark: bytes
    ) -> None:
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_captions(tmp_path / name) == {"ü.mp4": "Zoë"}

    @pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
    @pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
    def test_another_encoding_is_refused(self, tmp_path: Path, name: str, encoding: str) -> None:
        (tmp_path / name).write_bytes("file,caption\nü.mp4,Zoë\n".encode(encoding))
        with pytest.raises(RequestError, match="no UTF-8 text"):
            read_captions(tmp_path / name)

    @pytest.mark.parametrize("cells", ["a.mp4", "a.mp4,", "a.mp4,  ", 'a.mp4,""', "a.mp4,NaN"])
    def test_an_empty_cell_is_no_caption(self, tmp_path: Path, cells: str) -> None:
        (tmp_path / "a.csv").write_text(f"file,caption\n{cells}\nb.mp4,None of them speaks\n")
        assert read_captions(tmp_path / "a.csv") == {
            "a.mp4": None,
            "b.mp4": "None of them speaks",
        }

    @pytest.mark.parametrize("value", ["null", '""', '" \\n"', "NaN", '"None"', '"null"'])
    def test_an_empty_value_is_no_caption(self, tmp_path: Path, value: str) -> None:
        (tmp_path / "a.jsonl").write_text(f'{{"file": "a.mp4", "caption": {value}}}')
        assert read_captions(tmp_path / "a.jsonl") == {"a.mp4": None}

    @pytest.mark.parametrize("value", ["3", "0", "true", '["a"]', "{}", "1e999"])
    def test_a_value_that_is_no_text_is_refused_with_its_line(
        self, tmp_path: Path, value: str
    ) -> None:
        (tmp_path / "a.jsonl").write_text(f'\n{{"file": "a.mp4", "caption": {value}}}')
        with pytest.raises(RequestError, match=r"line 2: the caption is .* no text"):
            read_captions(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("value", ["null", "3", '""', '" "'])
    def test_a_file_without_a_name_is_refused(self, tmp_path: Path, value: str) -> None:
        (tmp_path / "a.jsonl").write_text(f'{{"file": {value}, "caption": "a"}}')
        with pytest.raises(RequestError, match=r"line 1: the file is .* names no file"):
            read_captions(tmp_path / "a.jsonl")

    def test_a_caption_cut_at_its_comma_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("file,caption\nb.mp4,x\na.mp4,A woman, speaking\n")
        with pytest.raises(RequestError, match=r"line 3 has 3 cells .* between double quotes"):
            read_captions(tmp_path / "a.csv")

    def test_a_quote_without_its_end_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('file,caption\na.mp4,"A woman\nb.mp4,B\n')
        with pytest.raises(RequestError, match="cannot read captions"):
            read_captions(tmp_path / "a.csv")

    def test_two_captions_of_one_file_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("file,caption\na.mp4,A\n./a.mp4,A\n")
        assert read_captions(tmp_path / "a.csv") == {"a.mp4": "A"}
        (tmp_path / "a.csv").write_text("file,caption\na.mp4,A\na.mp4,B\n")
        with pytest.raises(RequestError, match=r"line 3: a\.mp4 has another caption"):
            read_captions(tmp_path / "a.csv")

    def test_a_name_that_is_not_utf8_is_written_escaped(self, tmp_path: Path) -> None:
        name = b"g\xc4\xe3.mp4".decode(errors="surrogateescape")
        (tmp_path / "a.jsonl").write_text(json.dumps({"file": name, "caption": "A"}))
        assert read_captions(tmp_path / "a.jsonl") == {name: "A"}


class TestMatching:
    TABLE = Path("a.csv")

    def test_names_of_other_systems_are_found(self) -> None:
        composed, parts = (unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD"))
        names = [f"x/{parts}", "A.mp4", "a.mp4"]
        captions = {f"x\\{composed}": "E", "a.mp4": "small", " A.mp4": None}
        assert match_captions(captions, names, self.TABLE) == {
            f"x/{parts}": "E",
            "a.mp4": "small",
            "A.mp4": None,
        }

    def test_names_of_two_videos_and_of_none_are_refused(self) -> None:
        composed, parts = (unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD"))
        both = [composed, parts, "b.mp4"]
        assert match_captions({parts: "E", composed: "F"}, both, self.TABLE) == {
            parts: "E",
            composed: "F",
        }
        for file in (f" {composed}", "B.mp4", "../b.mp4", "/b.mp4"):
            with pytest.raises(RequestError, match="1 files that are not in the folder"):
                match_captions({file: "E"}, both, self.TABLE)


class TestTextsBeside:
    @pytest.mark.parametrize(
        ("data", "caption"),
        [
            (None, None),
            (b"", None),
            (BOM + b" \r\n", None),
            (BOM + b"late\r\n", "late"),
            ("Zoë".encode(), "Zoë"),
        ],
    )
    def test_it_is_the_caption(
        self, tmp_path: Path, data: bytes | None, caption: str | None
    ) -> None:
        if data is not None:
            (tmp_path / "a.txt").write_bytes(data)
        assert read_caption_beside(tmp_path / "a.mp4") == caption

    def test_another_encoding_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("Zoë".encode("cp1252"))
        with pytest.raises(RequestError, match=r"a\.txt: it is no UTF-8 text"):
            read_caption_beside(tmp_path / "a.mp4")

    def test_a_name_too_long_for_a_text_has_none(self, tmp_path: Path) -> None:
        assert read_caption_beside(tmp_path / f"{252 * 'n'}.ts") is None
