"""A folder of published answers: what is added, what is skipped, what the card says, and who can read it."""

import json

import pytest
import yaml
from datasets import load_dataset
from test_dataset import answered, byte_tokenizer, labelled_texts

from transformers_confu.data.dataset import place_of_prompt, prepare_dataset, split_by_prompt
from transformers_confu.data.encoding import prompt_hash
from transformers_confu.data.publication import main, publish_answers, write_card


ORIGIN = {"source": "mine", "license": "MIT"}


def plain_rows(numbers, temperature=0.7, seed=1, **fields):
    """Answers to single prompts."""
    made_with = {"target": "t", "seed": seed, "generation": {"eos_token_id": [1]}}
    return [
        {"id": f"p{number}", "messages": messages(number), "answer_ids": [[number % 200, 7, 8]], "finished": True}
        | {"temperature": temperature, "made_with": made_with, **fields}
        for number in numbers
    ]


def messages(number):
    return [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "abc"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def test_answers_become_shards_that_are_added_and_never_rewritten(tmp_path):
    answers, folder = write(tmp_path / "a.jsonl", plain_rows(range(200), **ORIGIN)), tmp_path / "corpus"
    added = publish_answers([answers], folder)
    held_out = [number for number in range(200) if place_of_prompt(prompt_hash(f"Question {number}")) < 0.02]
    assert 0 < len(held_out) < 15
    assert added == {"train": 200 - len(held_out), "held_out": len(held_out)}
    before = shards(folder)
    assert list(before) == ["held_out-00000.parquet", "train-00000.parquet"]

    # The file has grown since, its last line is being written, and there are answers of another pass.
    write(answers, plain_rows(range(203), **ORIGIN))
    with open(answers, "a") as file:
        file.write('{"id": "p999", "prom')
    more = write(tmp_path / "b.jsonl", plain_rows(range(5), seed=2, **ORIGIN))
    assert publish_answers([answers, more], folder).total() == 8
    after = shards(folder)
    assert {name: after[name] for name in before} == before and "train-00001.parquet" in after
    assert publish_answers([answers, more], folder).total() == 0
    assert shards(folder) == after

    rows = load_dataset(str(folder))
    assert rows["train"].num_rows + rows["held_out"].num_rows == 208
    assert {row["id"] for row in rows["held_out"]} <= {f"p{number}" for number in (*held_out, 200, 201, 202)}
    row = rows["train"][0]
    number = int(row["id"][1:])
    assert row["messages"] == messages(number)
    assert (row["answer_ids"], row["temperature"], row["seed"], row["source"]) == ([[number, 7, 8]], 0.7, 1, "mine")
    assert json.loads(row["made_with"])["generation"] == {"eos_token_id": [1]}


def test_greedy_answers_of_another_seed_are_the_same_answers(tmp_path):
    rows = {seed: plain_rows(range(3), temperature=0.0, seed=seed, **ORIGIN) for seed in (1, 2)}
    files = [write(tmp_path / f"{seed}.jsonl", rows[seed]) for seed in rows]
    assert publish_answers(files, tmp_path / "corpus").total() == 3


def test_training_reads_the_folder_and_holds_the_same_prompts_out(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [
        answered(tokenizer, [(f"Question {number}", "one"), ("And?", "two")], id=number)
        | {"temperature": 0.0, "finished": True, "made_with": {"target": "t", "seed": 0}}
        | ORIGIN
        for number in range(200)
    ]
    folder = tmp_path / "read_by_training"
    publish_answers([write(tmp_path / "a.jsonl", rows)], folder)
    train, held_out = split_by_prompt(prepare_dataset(folder, tokenizer, 999, made_by="t"))
    published = load_dataset(str(folder))  # a name of its own: `datasets` keeps local folders by their name
    for prepared, split in ((train, "train"), (held_out, "held_out")):
        assert set(prepared["prompt_hash"]) == set(published[split]["prompt_hash"])
    assert labelled_texts(tokenizer, train[0]) == ["one<|im_end|>", "two<|im_end|>"]
    with pytest.raises(ValueError, match="made by another target"):
        prepare_dataset(folder, tokenizer, 999, made_by="another")


def test_the_card_counts_and_names_sources(tmp_path):
    prompts = [{"id": f"p{number}", "category": "c", "source": "gsm8k-train", "license": "MIT"} for number in range(4)]
    answers = [
        write(tmp_path / "a.jsonl", plain_rows(range(4))),
        write(tmp_path / "b.jsonl", plain_rows(range(4), 0.0, finished=False)),
        write(tmp_path / "c.jsonl", plain_rows([4], source="talks", license="by permission")),
    ]
    folder = tmp_path / "corpus"
    publish_answers(answers, folder, prompts=prompts)
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == ["mit", "other"] and head["configs"][0]["data_files"][0]["split"] == "train"
    for part in (
        "9 conversations with 27 answer tokens",
        "| 0 | 4 | 12 | 0% |",
        "| 0.7 | 5 | 15 | 100% |",
        "| gsm8k-train | MIT | GSM8K (Cobbe et al., arXiv 2110.14168), https://github.com/openai/",
        "| talks | by permission |  | 1 | 3 |",
    ):
        assert part in card
    facts = yaml.safe_load((folder / "card.yaml").read_text())
    facts["sources"]["talks"]["credit"] = "the speakers"
    facts["text"] = "Further words."
    (folder / "card.yaml").write_text(yaml.safe_dump(facts))
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "| talks | by permission | the speakers | 1 | 3 |" in card and "\nFurther words.\n" in card
    (folder / "card.yaml").write_text("titel: x\n")
    with pytest.raises(ValueError, match=r"card\.yaml holds .*titel.*, expected entries of title, target"):
        write_card(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer_ids": None}, "it has no answer_ids, expected an answer as"),
        ({"source": None}, "source and licence of the prompt 'p0' are not known: name the file with the prompts"),
        ({"messages": [{"role": "user"}]}, "expected a message with a role and a content"),
        ({"messages": [{"role": "tool", "content": "x", "name": "f"}]}, "its messages hold name, expected role and"),
        ({"made_with": {"target": "u"}}, r"another target than the rest .* \(target was 't', is 'u'\)"),
    ],
)
def test_what_cannot_be_published_is_refused_and_nothing_is_written(tmp_path, row, message):
    answers = write(tmp_path / "a.jsonl", [*plain_rows([1], **ORIGIN), plain_rows([0], **ORIGIN)[0] | row])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*({message})"):
        publish_answers([answers], tmp_path / "corpus")
    assert not list((tmp_path / "corpus" / "data").glob("*.parquet"))
    write(answers, plain_rows([1], **ORIGIN))
    assert publish_answers([answers], tmp_path / "corpus").total() == 1


def test_command_line(tmp_path, capsys):
    answers = write(tmp_path / "a.jsonl", plain_rows(range(3)))
    prompts = write(tmp_path / "p.jsonl", [{"id": f"p{number}", **ORIGIN} for number in range(3)])
    main(["--answers", str(answers), "--prompts", str(prompts), "--output", str(tmp_path / "corpus")])
    assert "rows added to train: 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="There is no file nowhere"):
        main(["--answers", "nowhere", "--output", str(tmp_path / "corpus")])
