"""Rows from files, folders, addresses and the Hub."""

import gzip
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets import Dataset

from transformers_confu.data import rows as rows_module
from transformers_confu.data.rows import load_rows


def test_load_rows(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("prompt,n\na,1\nb,2\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_text(lines)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "lines.json").write_text(lines)
    for name in ("rows.jsonl", "rows.json", "lines.json", "rows.csv", "folder", "saved"):
        assert list(load_rows(tmp_path / name)) == rows, name
        assert list(load_rows(str(tmp_path / name))) == rows


def test_compressed_files_and_those_with_a_byte_order_mark(tmp_path):
    rows = [{"prompt": "é\u2028"}, {"prompt": "b"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8-sig"))
    (tmp_path / "a.json").write_bytes(json.dumps(rows).encode("utf-8-sig"))
    for name in ("a.jsonl.gz", "a.jsonl", "a.json"):
        assert list(load_rows(tmp_path / name)) == rows


def test_rows_may_differ_in_kind(tmp_path):
    rows = [{"id": 1, "prompt": "a"}, {"id": "b", "prompt": [{"role": "user", "content": "c"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_rows(tmp_path / "rows.jsonl")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"a": 1}\n{"b": \n', r"bad\.jsonl, line 2 is not JSON"),
        ("bad.jsonl", b'{"a": 1}\n[1]\n', r"bad\.jsonl, line 2 holds a list"),
        ("bad.jsonl", b"", r"bad\.jsonl holds no row"),
        ("torn.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-10], r"torn\.jsonl\.gz cannot be decompressed"),
        ("rows.xyz", b"?", r"rows\.xyz cannot be read as a file, folder, address or Hub dataset"),
        (None, b"", r"There is no file, folder, address or Hub dataset .*none\.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / (name or "none.jsonl"))


def test_a_folder_whose_files_have_different_columns_is_explained(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "b"}\n')
    with pytest.raises(ValueError, match="its files have different columns, so give each .*question: string"):
        load_rows(tmp_path)


def test_both_splits_of_published_answers_are_read_also_after_shards_were_added(tmp_path):
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "data").mkdir()
    for name, number in (("held_out-00000", 1), ("train-00000", 2), ("train-00001", 3)):
        Dataset.from_dict({"n": [number]}).to_parquet(tmp_path / "data" / f"{name}.parquet")
        assert sorted(load_rows(tmp_path)["n"]) == list(range(1, number + 1))


def test_load_rows_from_an_address(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert list(load_rows(f"{address}/rows.jsonl")) == rows
            with pytest.raises(ValueError, match=r"There is no .*none\.jsonl"):
                load_rows(f"{address}/none.jsonl")
        finally:
            server.shutdown()
            thread.join(timeout=10)
    with pytest.raises(ValueError, match=r"rows\.jsonl, or it is out of reach: |rows\.jsonl cannot be read"):
        load_rows(f"{address}/rows.jsonl")


def test_load_rows_asks_the_hub_for_name_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        rows_module, "load_dataset", lambda *args, **kwargs: asked.append((*args, kwargs["split"])) or []
    )
    for source in ("org/name", "org/name:test", "org/name:main:test"):
        load_rows(source)
    assert asked == [("org/name", "train"), ("org/name", "test"), ("org/name", "main", "test")]

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(rows_module, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"org/name cannot be read .*: offline"):
        load_rows("org/name")
