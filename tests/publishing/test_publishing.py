"""`publish`: what goes to the Hub, what is refused before, and that nothing is left behind. No network."""

import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import _http
from transformers import AutoModel
from transformers.utils import logging

import transformers_confu
from helpers import make_tiny_draft, make_tiny_target
from hub_stand_in import HubServer
from transformers_confu import cli, confu_generation_config
from transformers_confu.inference.target import TargetRunner
from transformers_confu.publishing import publish as hub
from transformers_confu.publishing.model_card import CARD_FILE, CardFacts
from transformers_confu.publishing.publish import CHECK_PROMPTS, publish


FACTS = CardFacts(base_model="org/target", license="mit", training="Trained on *nothing*.")
INFERENCE = Path(transformers_confu.__file__).parent / "inference"
FILES = {path.name for path in INFERENCE.glob("*.py") if path.name != "__init__.py"} | {
    *(".gitattributes", "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("chat_template.jinja", "custom_generate/generate.py", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from _targets import tiny_tokenizer

    yield tiny_tokenizer()
    sys.modules.pop("_targets")


@pytest.fixture
def target():
    return make_tiny_target(vocab_size=258, max_position_embeddings=1024)


@pytest.fixture
def draft(target):
    draft = make_tiny_draft(target)
    draft.generation_config.confu_tree_size = 12
    return draft


@pytest.fixture(autouse=True)
def a_shorter_check(monkeypatch):
    monkeypatch.setattr(hub, "CHECK_PROMPTS", CHECK_PROMPTS[:2])
    monkeypatch.setattr(hub, "CHECK_TOKENS", 16)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, a machine on which nobody is logged in, and `tmp_path / "scratch"` for temporary folders."""
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    before = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(server.client)
    yield server
    huggingface_hub.set_client_factory(before)


@pytest.fixture
def nothing_left(tmp_path, server):
    """After the test, no temporary folder is there."""
    yield
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_published_draft_is_complete(draft, target, tokenizer, server, nothing_left, tmp_path):
    address = publish(draft, target, tokenizer, "org/draft", FACTS, private=True, token="hf_good")
    assert address.startswith("https://huggingface.co/org/draft/commit/")
    assert server.private == {"org/draft": True}
    assert server.messages == ["Upload ConFu draft"]
    files = server.branches["org/draft", "main"]
    assert files.keys() == FILES
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


def test_publishing_again_removes_what_is_no_longer_part_of_it(draft, target, tokenizer, server, nothing_left):
    for _ in range(2):
        publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_good")
        files = server.branches["org/draft", "main"]
        assert files.keys() - {"NOTES"} == FILES
        leftovers = ("old_code.py", "model-00001-of-00002.safetensors", "training_args.bin", "NOTES")
        files.update(dict.fromkeys(leftovers, b"left"))
    publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_good")
    assert server.branches["org/draft", "main"].keys() == FILES | {"NOTES"}


@pytest.mark.parametrize(
    ("options", "branch", "address"),
    [
        ({"revision": "v2"}, "v2", "/commit/"),
        ({"create_pr": True}, "refs/pr/1", "/discussions/1"),
        ({"create_pr": True, "revision": "main"}, "refs/pr/1", "/discussions/1"),
    ],
    ids=["branch", "pull request", "pull request to main"],
)
def test_a_branch_or_a_pull_request(options, branch, address, draft, target, tokenizer, server, nothing_left):
    options = {**options, "commit_message": "A better draft", "token": "hf_good"}
    assert address in publish(draft, target, tokenizer, "org/draft", FACTS, **options)
    assert server.branches["org/draft", branch].keys() == FILES
    assert server.branches["org/draft", "main"].keys() == {".gitattributes"}
    assert server.messages == ["A better draft"]


@pytest.mark.parametrize("call", ["repos/create", "models/org/draft/preupload/main", "models/org/draft/commit/main"])
def test_a_refused_upload_leaves_nothing(call, draft, target, tokenizer, server, nothing_left):
    server.refuse[call] = 403
    with pytest.raises(HfHubHTTPError, match="403"):
        publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_good")
    assert server.branches.get(("org/draft", "main"), {}).keys() <= {".gitattributes"}
    del server.refuse[call]
    publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_good")  # and can be tried again
    assert server.branches["org/draft", "main"].keys() == FILES


def test_an_interruption_leaves_nothing(draft, target, tokenizer, server, nothing_left, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "check_exactness", interrupt)
    for options in ({"token": "hf_good"}, {"dry_run": tmp_path / "runs" / "out"}):
        with pytest.raises(KeyboardInterrupt):
            publish(draft, target, tokenizer, "org/draft", FACTS, **options)
    assert list((tmp_path / "runs").iterdir()) == []
    assert server.private == {}


def test_who_is_not_logged_in_learns_it_first(draft, target, tokenizer, server, nothing_left, monkeypatch):
    monkeypatch.setattr(hub, "build", lambda *args: pytest.fail("the check must not begin"))
    with pytest.raises(LocalTokenNotFoundError, match="hf auth login"):
        publish(draft, target, tokenizer, "org/draft", FACTS)
    with pytest.raises(HfHubHTTPError, match="401|Invalid user token"):
        publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_bad")
    assert server.private == {}


def test_a_dry_run_writes_the_folder_and_sends_nothing(draft, target, tokenizer, server, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "out"
    build = hub.build

    def build_beside(folder, *arguments):
        assert folder.parents[1] == out.parent  # from elsewhere it might not move in one step
        build(folder, *arguments)

    monkeypatch.setattr(hub, "build", build_beside)
    mask = os.umask(0o022)
    assert publish(draft, target, tokenizer, dry_run=out) == str(out)  # needs neither a repository nor a card
    os.umask(mask)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {str(file.relative_to(out)) for file in files} == FILES - {".gitattributes"}
    # safetensors writes files for their owner only.
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert "Apache License" in (out / "LICENSE").read_text()
    assert server.calls == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists; a dry run writes a new folder"):
        publish(draft, target, tokenizer, dry_run=out)


def other_target(draft, target):
    return draft, make_tiny_target(vocab_size=259)


def broken_weights(draft, target):
    draft.fc.weight.data[0, 0] = torch.nan
    return draft, target


def more_tokens(draft, target):
    return make_tiny_draft(small := make_tiny_target(vocab_size=200)), small


def renamed_target(draft, target):
    target.name_or_path = "someone/else"
    return draft, target


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (other_target, {}, "made for a target with `vocab_size=258`"),
        (broken_weights, {}, "hold numbers that are not finite"),
        (more_tokens, {}, "The tokenizer has token ids up to 257"),
        (renamed_target, {}, "card names the target org/target, but the draft is checked against someone/else"),
        (None, {"repo_id": "draft"}, "The repository is 'draft'; expected 'organisation/name'"),
        (None, {"create_pr": True, "revision": "v2"}, "pull request goes to main, but `revision` is 'v2'"),
    ],
    ids=[
        "other sizes",
        "weights",
        "tokenizer",
        "other name",
        "no organisation",
        "pull request to a branch",
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written_or_sent(
    change, options, message, draft, target, tokenizer, server, tmp_path
):
    draft, target = change(draft, target) if change else (draft, target)
    arguments = {"repo_id": "org/draft", "facts": FACTS} | options
    for where in ({"token": "hf_good"}, {"dry_run": tmp_path / "runs" / "out"}):
        with pytest.raises(ValueError, match=message):
            publish(draft, target, tokenizer, **arguments, **where)
    assert server.calls == []
    assert not (tmp_path / "runs").exists() and list((tmp_path / "scratch").iterdir()) == []


class Falsified:
    """A target whose assisted answers have another token in their middle, where plain `generate` is unchanged."""

    def __init__(self, target, monkeypatch):
        native = type(target).generate

        def generate(model, *args, assistant_model=None, **kwargs):
            output = native(model, *args, assistant_model=assistant_model, **kwargs)
            if assistant_model is not None:
                output[0, -9] = (output[0, -9] + 1) % 258
            return output

        monkeypatch.setattr(type(target), "generate", generate)


def test_a_text_that_is_not_plain_generates_is_not_published(
    draft, target, tokenizer, server, nothing_left, monkeypatch
):
    Falsified(target, monkeypatch)
    with pytest.raises(ValueError, match="is not plain generate's: it differs from token 8 on, .* please report it"):
        publish(draft, target, tokenizer, "org/draft", FACTS, token="hf_good")
    assert server.private == {}


def test_half_precision_counts_differences(draft, target, tokenizer, monkeypatch):
    target.bfloat16()
    exact = hub.check_exactness(target, draft, tokenizer, CHECK_PROMPTS[:2])
    assert "of 2 greedy answers of up to 16 tokens, target in bfloat16, " in exact and "; tau " in exact
    Falsified(target, monkeypatch)
    check = hub.check_exactness(target, draft, tokenizer, CHECK_PROMPTS[:2])
    assert "target in bfloat16, 0 equal plain `generate`'s" in check


def test_ties_are_told_apart_from_faults(draft, target, tokenizer, monkeypatch):
    """Where all scores are equal, any other token is a tie."""
    torch.nn.init.zeros_(target.lm_head.weight)
    Falsified(target, monkeypatch)
    check = hub.check_exactness(target, draft, tokenizer, CHECK_PROMPTS[:1])
    assert ", 0 equal plain `generate`'s, 1 part at a tie of two scores" in check


def test_the_gain_is_the_difference_of_two_counts(draft, target, tokenizer, monkeypatch):
    """Counted from outside: verifications of trees, and lengths of texts."""
    verified, prompts = [], ["One prompt.", "And another one."]
    verify = TargetRunner.verify
    monkeypatch.setattr(
        TargetRunner, "verify", lambda *args, **options: verified.append(1) or verify(*args, **options)
    )
    taus = []
    for rows in (0, 16):
        knobs = {"confu_tree_size": 16, "confu_depth": 4, "confu_branching": 8, "confu_contemplation": rows}
        config = confu_generation_config(target, max_new_tokens=16, do_sample=False, **knobs)
        inputs = [hub.encode(prompt, tokenizer) for prompt in prompts]
        target.generate(**inputs[0], assistant_model=draft, generation_config=config)  # proves the target first
        verified.clear()
        texts = [target.generate(**one, assistant_model=draft, generation_config=config) for one in inputs]
        tokens = sum(text.shape[1] - one["input_ids"].shape[1] - 1 for one, text in zip(inputs, texts, strict=True))
        taus.append(tokens / len(verified))
    said = hub.measure_future_gain(target, draft, tokenizer, prompts)
    assert taus[0] != taus[1]
    assert draft.generation_config.confu_future_gain == round(taus[1] - taus[0], 2)
    assert f"tau {taus[1]:.2f} with future predictions, {taus[0]:.2f} without, of 2 greedy answers" in said


def test_no_gain_of_an_untrained_channel(draft, target, tokenizer, monkeypatch):
    draft.generation_config.confu_contemplation = 0
    monkeypatch.setattr(target, "generate", lambda **_: pytest.fail("nothing is to be decoded"))
    assert "the future channel is untrained" in hub.measure_future_gain(target, draft, tokenizer, ["One."])
    assert not hasattr(draft.generation_config, "confu_future_gain")


def test_the_gain_is_published_and_told(command, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One."}\n{"prompt": "Two."}\n{"prompt": "Three."}\n')
    prompts = f"--prompts={tmp_path / 'prompts.jsonl'}"
    assert command("--dry_run", str(tmp_path / "out"), prompts) == 0
    gain = json.loads((tmp_path / "out" / "generation_config.json").read_text())["confu_future_gain"]
    said = capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`confu_future_gain` {gain}: tau " in said and "of 3 greedy answers" in said
    assert f"`confu_future_gain` {gain}: tau " in card and f"`confu_future_gain={gain}`" in card
    # A gain that is given stays, and nothing is measured.
    assert command("--dry_run", str(tmp_path / "given"), "--confu_future_gain=0.25") == 0
    assert json.loads((tmp_path / "given" / "generation_config.json").read_text())["confu_future_gain"] == 0.25
    assert "tau" not in capsys.readouterr().err
    assert command("--dry_run", str(tmp_path / "both"), prompts, "--confu_future_gain=0.25") == 1
    assert "give one of the two" in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text('{"question": "One."}\n')
    assert command("--dry_run", str(tmp_path / "other"), prompts) == 1
    assert "expected rows with a text `prompt`" in capsys.readouterr().err


# The command


@pytest.fixture
def warnings_of_hub(monkeypatch):
    """What the module warns of, as it reaches the log."""
    texts: list[str] = []
    monkeypatch.setattr(hub.logger, "warning", texts.append)
    logging.warning_once.cache_clear()
    return texts


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


def test_the_command_publishes_with_knobs(command, server, nothing_left, capsys, tmp_path):
    (tmp_path / "draft" / "LICENSE").write_text("Mine.")
    assert command("--token", "hf_good", "--private", "--confu-tree-size", "9", "--confu_contemplation", "0") == 0
    assert capsys.readouterr().out.startswith("https://huggingface.co/org/draft/commit/")
    files = server.branches["org/draft", "main"]
    assert files.keys() == FILES and server.private["org/draft"] is True
    assert files["LICENSE"] == b"Mine."
    knobs = {name: value for name, value in json.loads(files["generation_config.json"]).items() if "confu" in name}
    assert knobs == {"confu_tree_size": 9, "confu_contemplation": 0}  # and no gain of a channel that is not used
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"


def test_the_command_asks_for_nothing_that_a_dry_run_does_not_need(command, server, tmp_path, capsys):
    (tmp_path / "draft" / CARD_FILE).unlink()
    assert command("--dry_run", str(tmp_path / "out"), "--license=mit", "--language", "en", "de", repository=None) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en", "de"], None)
    assert "Weights: MIT." in card.text and "your-organisation/draft" in card.text
    # What an upload needs besides is told at once, not after the target is loaded.
    (tmp_path / "target" / "model.safetensors").unlink()
    assert command("--token=hf_good") == 1
    assert "its name there is not known; give it as `base_model`" in capsys.readouterr().err
    assert command("--token=hf_good", repository=None) == 1
    assert "Name the repository to publish to" in capsys.readouterr().err
    assert command("--dry_run", str(tmp_path / "other"), "--datasets", "/data/answers") == 1
    assert "names '/data/answers'; expected ids of the Hub" in capsys.readouterr().err
    assert server.calls == []


def test_a_card_can_be_written_alone(command, tmp_path, capsys):
    (tmp_path / "target" / "model.safetensors").unlink()  # nothing of the target is read
    assert command("--card_only") == 0
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert card.data.base_model == "org/target" and "`confu_tree_size=12`" in card.text
    assert 'custom_generate="org/draft"' in card.text


def test_the_command_warns_once_of_what_does_not_fit(command, server, nothing_left, tmp_path, warnings_of_hub):
    config = tmp_path / "draft" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 99}))
    assert command("--token", "hf_good") == 0
    assert sum("`max_position_embeddings` is 99" in text for text in warnings_of_hub) == 1


def test_the_command_fails_in_one_sentence(command, server, nothing_left, capsys, tmp_path):
    server.refuse["repos/create"] = 403
    assert command("--token", "hf_good") == 1
    assert "Not published: " in capsys.readouterr().err
    assert command() == 1
    assert "hf auth login" in capsys.readouterr().err
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert command("--token", "hf_good") == 1
    assert "are damaged or incomplete" in capsys.readouterr().err
    (tmp_path / "draft" / CARD_FILE).write_text("licence: mit")
    assert command() == 1
    assert "`licence` is not known; there are base_model, license" in capsys.readouterr().err
