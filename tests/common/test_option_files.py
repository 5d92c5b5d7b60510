"""Options of commands: as fields of a dataclass, and from a YAML file."""

from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser

from transformers_confu.common.files import read_json
from transformers_confu.common.option_files import option, read_option_file


@dataclass
class Options:
    name: str = option("Must be given.", ...)
    number: int = option("A number.", 3)
    made: list[str] = option("Made anew.", lambda: ["a", "b"])
    switch: bool | None = option("The name alone means true.", nargs="?", const=True)


def test_fields_are_options_in_both_spellings(capsys):
    parser = HfArgumentParser(Options)
    (options,) = parser.parse_args_into_dataclasses(["--name", "x"])
    assert options == Options("x", 3, ["a", "b"], None)
    (options,) = parser.parse_args_into_dataclasses(["--name=x", "--number=4", "--made", "c", "--switch"])
    assert options == Options("x", 4, ["c"], True)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([])
    assert "--name" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """Editors on Windows write one."""
    (tmp_path / "run.yaml").write_text("number: 4\n", encoding="utf-8-sig")
    assert read_option_file([str(tmp_path / "run.yaml"), "--name=x"], {"number": int}) == [["--number=4", "--name=x"]]
    (tmp_path / "state.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "state.json") == {"a": 1}
