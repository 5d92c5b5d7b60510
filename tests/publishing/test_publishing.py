"""`publish`: what goes to the Hub, what is refused before, and that nothing is left behind. No network."""

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel
from transformers.utils import logging

import transformers_confu
from helpers import example_models, make_tiny_draft, make_tiny_target
from transformers_confu import cli
from transformers_confu.inference.target import TargetRunner
from transformers_confu.publishing import check_answers
from transformers_confu.publishing import publish as hub
from transformers_confu.publishing.check_answers import check_exactness, measure_future_gain
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts
from transformers_confu.publishing.publish import publish


FACTS = CardFacts(base_model="org/target", license="mit", training="Trained on *nothing*.")
INFERENCE = Path(transformers_confu.__file__).parent / "inference"
FILES = {path.name for path in INFERENCE.glob("*.py") if path.name != "__init__.py"} | {
    *("LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("chat_template.jinja", "custom_generate/generate.py", "tokenizer.json", "tokenizer_config.json"),
}
PROMPTS = ["One prompt.", "And another one."]


@pytest.fixture
def tokenizer():
    return example_models()[1]


@pytest.fixture
def target():
    return make_tiny_target(vocab_size=258, max_position_embeddings=1024)


@pytest.fixture
def draft(target):
    draft = make_tiny_draft(target)
    draft.generation_config.confu_tree_size = 12
    draft.generation_config.confu_future_gain = 0.25  # so that nothing is measured
    return draft


@pytest.fixture(autouse=True)
def a_shorter_check(monkeypatch):
    monkeypatch.setattr(hub, "CHECK_PROMPTS", PROMPTS)
    monkeypatch.setattr(check_answers, "CHECK_TOKENS", 16)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub: what it was asked for, the files it got, and the call that it refuses. No temporary folder may stay."""
    server = SimpleNamespace(calls={}, files={}, refuse=None)

    def answering(name):
        def answer(api, *args, **options):
            server.calls[name] = options
            if name == server.refuse:
                raise HfHubHTTPError("403: you may not do that", response=mock.Mock())
            if name == "upload_folder":
                paths = [path for path in Path(options["folder_path"]).rglob("*") if path.is_file()]
                server.files = {str(path.relative_to(options["folder_path"])): path.read_bytes() for path in paths}
            return SimpleNamespace(repo_id=args and args[0], pr_url=None, commit_url="https://hub/commit")

        return answer

    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, answering(name))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    yield server
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.fixture
def one_file(monkeypatch):
    """What is built is one file: these tests are about where it goes."""

    def build(folder, *_):
        folder.mkdir()
        (folder / "README.md").write_text("A card.")

    monkeypatch.setattr(hub, "build", build)


def test_a_published_draft_is_complete_and_takes_the_place_of_an_earlier_one(
    draft, target, tokenizer, server, tmp_path
):
    assert publish(draft, target, tokenizer, "org/draft", FACTS) == "https://hub/commit"
    files, upload = server.files, server.calls["upload_folder"]
    assert files.keys() == FILES and (upload["repo_id"], upload["create_pr"]) == ("org/draft", False)
    earlier = ["old_code.py", "model-00001-of-00002.safetensors", "training_args.bin", "NOTES", ".gitattributes"]
    assert [*filter_repo_objects(earlier, allow_patterns=upload["delete_patterns"])] == earlier[:3]
    assert json.loads(files["generation_config.json"])["confu_tree_size"] == 12

    for name, data in files.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(data)
    fetched = AutoModel.from_pretrained(tmp_path / "fetched", trust_remote_code=True)
    assert all(torch.equal(value, fetched.state_dict()[name]) for name, value in draft.state_dict().items())
    generate = target.load_custom_generate(tmp_path / "fetched", trust_remote_code=True)
    assert generate.__globals__["REPOSITORY"] == "org/draft"

    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/target" and card.data.license == "mit"
    assert "Trained on *nothing*." in card.text and "`confu_tree_size=12`" in card.text
    assert "of 2 greedy answers of up to 16 tokens, target in float64, 2 equal plain `generate`'s; tau " in card.text


def test_an_interruption_leaves_nothing(draft, target, tokenizer, server, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "check_exactness", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(draft, target, tokenizer, "org/draft", FACTS, dry_run=tmp_path / "runs" / "out")
    assert list((tmp_path / "runs").iterdir()) == []


def test_who_is_not_logged_in_learns_it_first(draft, target, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "build", lambda *args: pytest.fail("the check must not begin"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(LocalTokenNotFoundError, match="hf auth login"):
        publish(draft, target, tokenizer, "org/draft", FACTS)


def test_a_dry_run_writes_the_folder_and_sends_nothing(draft, target, tokenizer, server, tmp_path):
    out = tmp_path / "runs" / "out"
    mask = os.umask(0o022)
    assert publish(draft, target, tokenizer, dry_run=out) == str(out)  # needs neither a repository nor a card
    os.umask(mask)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {str(file.relative_to(out)) for file in files} == FILES
    # safetensors writes files for their owner only.
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert "Apache License" in (out / "LICENSE").read_text()
    assert server.calls == {}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists; a dry run writes a new folder"):
        publish(draft, target, tokenizer, dry_run=out)


@pytest.mark.parametrize("kind", ["windows", "hybrid"])
def test_drafts_for_windows_and_recurrent_layers_are_measured_and_written(kind, tokenizer, tmp_path):
    target = make_tiny_target(kind, vocab_size=258, max_position_embeddings=1024)
    publish(make_tiny_draft(target), target, tokenizer, facts=FACTS, dry_run=tmp_path / "out")
    saved = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).double()
    assert saved.generation_config.confu_future_gain is not None
    ids = torch.arange(4, 14)[None]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    assert target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=saved).equal(plain)


@pytest.mark.parametrize(
    ("change", "repo_id", "message"),
    [
        (lambda draft, target: draft.config.update({"vocab_size": 259}), "org/draft", "with `vocab_size=259`"),
        (lambda draft, target: draft.fc.weight.data.fill_(torch.nan), "org/draft", "hold numbers that are not finite"),
        (lambda draft, target: setattr(target, "name_or_path", "some/one"), "org/draft", "checked against some/one"),
        (lambda draft, target: None, "draft", "The repository is 'draft'; expected 'organisation/name'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written_or_sent(
    change, repo_id, message, draft, target, tokenizer, server, tmp_path
):
    change(draft, target)
    for where in ({}, {"dry_run": tmp_path / "runs" / "out"}):
        with pytest.raises(ValueError, match=message):
            publish(draft, target, tokenizer, repo_id, FACTS, **where)
    assert server.calls == {} and not (tmp_path / "runs").exists()


# The check


def falsify(target, monkeypatch):
    """Assisted answers have another token in their middle; plain `generate` is unchanged."""
    native = type(target).generate

    def generate(model, *args, assistant_model=None, **kwargs):
        output = native(model, *args, assistant_model=assistant_model, **kwargs)
        if assistant_model is not None:
            output[0, -9] = (output[0, -9] + 1) % 258
        return output

    monkeypatch.setattr(type(target), "generate", generate)


def test_a_text_that_is_not_plain_generates_is_refused_and_in_half_precision_counted(
    draft, target, tokenizer, monkeypatch
):
    falsify(target, monkeypatch)
    with pytest.raises(ValueError, match="is not plain generate's: it differs from token 8 on, .* please report it"):
        check_exactness(target, draft, tokenizer, PROMPTS)
    found = check_exactness(copy.deepcopy(target).bfloat16(), draft, tokenizer, PROMPTS)
    assert "target in bfloat16, 0 equal plain `generate`'s; tau " in found
    torch.nn.init.zeros_(target.lm_head.weight)  # where all scores are equal, any other token is a tie
    found = check_exactness(target, draft, tokenizer, PROMPTS[:1])
    assert ", 0 equal plain `generate`'s, 1 part at a tie of two scores" in found


def test_the_gain_is_the_difference_of_two_counts(draft, target, tokenizer, monkeypatch):
    """Counted from outside: verifications of trees, and lengths of texts."""
    rounds, tokens = [], []
    verify, generate = TargetRunner.verify, type(target).generate

    def counting_verify(runner, *args, **options):
        rounds[-1] += 1
        return verify(runner, *args, **options)

    def counting_generate(target, input_ids, **options):
        config = options["generation_config"]
        assert (config.confu_tree_size, config.confu_depth, config.confu_branching) == (16, 4, 8)
        rounds.append(0)
        text = generate(target, input_ids, **options)
        tokens.append((config.confu_contemplation, text.shape[1] - input_ids.shape[1] - 1))
        return text

    measure_future_gain(target, draft, tokenizer, PROMPTS[:1])  # first calls prove the target, by more verifications
    monkeypatch.setattr(TargetRunner, "verify", counting_verify)
    monkeypatch.setattr(type(target), "generate", counting_generate)
    said = measure_future_gain(target, draft, tokenizer, PROMPTS)
    assert [rows for rows, _ in tokens] == [0, 0, 16, 16]
    taus = [sum(count for _, count in tokens[i : i + 2]) / sum(rounds[i : i + 2]) for i in (0, 2)]
    gain = round(taus[1] - taus[0], 2)
    error = float(re.search(r"standard error ([\d.]+)", said).group(1))
    assert f"from a gain of {gain} " in said and gain != 0 and error > 0
    # What adds nothing beyond chance counts as nothing.
    assert draft.generation_config.confu_future_gain == (gain if gain > error else min(gain, 0.0))
    told = f"{taus[1]:.2f} with future predictions, {taus[0]:.2f} without, over {sum(rounds[2:])} rounds of 2 greedy"
    assert told in said


def test_no_gain_of_an_untrained_channel(draft, target, tokenizer, monkeypatch):
    draft.generation_config.confu_contemplation = 0
    monkeypatch.setattr(target, "generate", lambda **_: pytest.fail("nothing is to be decoded"))
    assert "the future channel is untrained" in measure_future_gain(target, draft, tokenizer, PROMPTS)
    assert draft.generation_config.confu_future_gain == 0.25


# The command


@pytest.fixture
def command(draft, target, tokenizer, server, tmp_path, monkeypatch):
    """`confu publish` with the tiny models, for a saved draft with its card; its exit status."""
    draft.save_pretrained(tmp_path / "draft")
    FACTS.save(tmp_path / "draft" / CARD_FILE)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")

    def run(*arguments: str, repository: str | None = "org/draft") -> int:
        names = [str(tmp_path / "draft"), str(tmp_path / "target"), *([repository] if repository else [])]
        return cli.main(["publish", *names, "--target_dtype=float64", *arguments])

    return run


def test_the_command_publishes_with_knobs_and_warns_once(command, server, capsys, tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(hub.logger, "warning", warnings.append)
    logging.warning_once.cache_clear()
    config = tmp_path / "draft" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 99}))
    (tmp_path / "draft" / "LICENSE").write_text("Mine.")
    assert command("--private", "--confu-tree-size", "9", "--confu_contemplation", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "https://hub/commit\n" and "gain" not in printed.err
    files = server.files
    assert files.keys() == FILES and server.calls["create_repo"]["private"] is True
    assert files["LICENSE"] == b"Mine."
    knobs = {name: value for name, value in json.loads(files["generation_config.json"]).items() if "confu" in name}
    assert knobs == {"confu_tree_size": 9, "confu_contemplation": 0, "confu_future_gain": 0.25}
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"
    assert sum("`max_position_embeddings` is 99" in text for text in warnings) == 1


def test_a_dry_run_asks_for_nothing_it_does_not_need_and_tells_the_gain(command, tmp_path, capsys):
    (tmp_path / "draft" / CARD_FILE).unlink()
    (tmp_path / "facts.yaml").write_text("license: mit\nlanguage: [en, de]\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One."}\n{"prompt": "Two."}\n{"prompt": "Three."}\n')
    options = [f"--card={tmp_path / 'facts.yaml'}", f"--prompts={tmp_path / 'prompts.jsonl'}"]
    assert command("--dry_run", str(tmp_path / "out"), *options, repository=None) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en", "de"], None)
    assert "Weights: MIT." in card.text and "your-organisation/draft" in card.text
    gain = json.loads((tmp_path / "out" / "generation_config.json").read_text())["confu_future_gain"]
    told = f"`confu_future_gain` {gain}, from a gain of "
    assert told in card.text and f"`confu_future_gain={gain}`" in card.text
    said = capsys.readouterr().err
    assert told in said and "of 3 greedy answers" in said


def test_a_card_can_be_written_alone(command, tmp_path, capsys):
    (tmp_path / "target" / "model.safetensors").unlink()  # nothing of the target is read
    assert command("--card_only") == 0
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert card.data.base_model == "org/target" and "`confu_tree_size=12`" in card.text
    assert 'custom_generate="org/draft"' in card.text


def test_the_command_fails_in_one_sentence_before_any_work(command, server, capsys, tmp_path):
    def refused(*arguments: str, **options) -> str:
        assert command(*arguments, **options) == 1
        return capsys.readouterr().err

    (tmp_path / "rows.jsonl").write_text('{"question": "One."}\n')
    (tmp_path / "target" / "model.safetensors").unlink()
    out = f"--dry_run={tmp_path / 'out'}"
    assert "Name the repository to publish to" in refused(repository=None)
    assert "expected rows with a text `prompt`" in refused(out, f"--prompts={tmp_path / 'rows.jsonl'}")
    assert "give one of the two" in refused(out, "--prompts=rows.jsonl", "--confu_future_gain=0.25")
    (tmp_path / "draft" / CARD_FILE).unlink()
    assert "its name there is not known; give it as `base_model`" in refused()
    (tmp_path / "draft" / CARD_FILE).write_text("licence: mit")
    assert "`licence` is not known; there are base_model, license" in refused()
    FACTS.save(tmp_path / "draft" / CARD_FILE)
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "are damaged or incomplete" in refused()
    assert server.calls == {}


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_what_the_hub_refuses_is_one_sentence(call, command, server, one_file, capsys):
    server.refuse = call
    assert command("--create_pr") == 1
    assert capsys.readouterr().err == "Not published: 403: you may not do that\n"
    assert server.calls.get("upload_folder", {"create_pr": True})["create_pr"]
