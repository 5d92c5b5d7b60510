"""A file of JSON lines outlives an interruption, and says where it is damaged."""

import gzip

import pytest

from transformers_confu.common.files import differences, read_json, write_atomically
from transformers_confu.common.jsonl import JsonLines, read_jsonl


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "new folder" / "rows.jsonl"
    JsonLines(path).append([{"a": 1}, {"a": "é"}])
    with open(path, "ab") as file:
        file.write(b'{"a": 3')
    resumed = JsonLines(path)
    assert list(resumed.rows()) == [(1, {"a": 1}), (2, {"a": "é"})]
    assert path.read_bytes().endswith(b'{"a": 3')  # left alone until something is appended
    resumed.append([{"a": 4}])
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"a": "é"}\n{"a": 4}\n'


def test_damage_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"a": 1}\n'.encode() + b"[2]\n"))
    rows = read_jsonl(path)
    assert next(rows) == {"a": 1}  # without its byte-order mark
    with pytest.raises(ValueError, match="rows.jsonl.gz, line 2 holds a list"):
        next(rows)
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20])
    with pytest.raises(ValueError, match="rows.jsonl.gz cannot be decompressed"):
        list(read_jsonl(path))


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, '{"step": 1}')
    write_atomically(path, '{"step": 2}')
    assert read_json(path) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_an_empty_state_file_is_named(tmp_path):
    (tmp_path / "state.json").touch()
    with pytest.raises(ValueError, match="state.json is no valid JSON"):
        read_json(tmp_path / "state.json")


def test_settings_that_differ_are_listed():
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": "x"}) == "a was 1, is None; c was None, is 'x'"
    assert differences({"a": 1}, {"a": 1}) == ""
