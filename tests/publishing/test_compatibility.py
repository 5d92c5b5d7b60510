"""Whether a draft fits a target: what is found, from configurations alone, and what the command says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, T5Config

from eagle3_source import Source
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuDraftModel, cli
from transformers_confu.common.loading import load_draft
from transformers_confu.conversion.resize import resize_vocabulary
from transformers_confu.publishing.compatibility import Finding, check_compatibility, main


def make_tokenizer(words: int = 97, template: str = "{{ messages[0]['content'] }}") -> PreTrainedTokenizerFast:
    vocabulary = {f"word{i}": i for i in range(words)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def target():
    return make_tiny_target(eos_token_id=[2, 5])


@pytest.fixture
def folder(target, tmp_path):
    """A draft on the disk, with the tokenizer it was trained with."""
    make_tiny_draft(target, draft_vocab_size=40).save_pretrained(tmp_path / "draft")
    make_tokenizer().save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def sentences(findings: list[Finding], is_error: bool = True) -> str:
    assert findings and all(finding.is_error == is_error for finding in findings), findings
    return " ".join(finding.sentence for finding in findings)


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_draft_fits_its_own_target(target, folder, monkeypatch, capsys):
    # Nobody is asked whether to run the code of the draft.
    monkeypatch.setattr("builtins.input", pytest.fail)
    draft = make_tiny_draft(target)
    for given in (target, target.config):
        assert check_compatibility(given, None, draft) == []
        assert check_compatibility(given, make_tokenizer(), folder) == []
    assert "custom code" not in capsys.readouterr().out


OTHER_TARGETS = {
    "vocabulary": ({"vocab_size": 98}, "`vocab_size=97`, but LlamaForCausalLM has 98"),
    # A trillion parameters, if anything of it were made.
    "width": (
        {"hidden_size": 1 << 15, "intermediate_size": 1 << 17},
        "`hidden_size=32`, but LlamaForCausalLM has 32768",
    ),
    "depth": ({"num_hidden_layers": 6}, "`num_hidden_layers=5`, but LlamaForCausalLM has 6"),
    "cached heads": ({"num_key_value_heads": 1}, "caches 1 key/value heads of size 8, but the draft's soft prompts"),
    "RoPE": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "uses RoPE type 'dynamic'",
    ),
}


@pytest.mark.parametrize("changes, sentence", OTHER_TARGETS.values(), ids=OTHER_TARGETS.keys())
def test_another_target(target, changes, sentence):
    draft = make_tiny_draft(target)
    config = LlamaConfig(**target.config.to_dict() | changes)
    assert sentence in sentences(check_compatibility(config, None, draft))


@pytest.mark.parametrize(("vocab_size", "own_embeddings"), [(128, True), (90, True), (90, False)])
def test_a_draft_is_carried_over_to_a_resized_target(target, tmp_path, vocab_size, own_embeddings, capsys):
    narrow = {"hidden_size": 16, "head_dim": 4} if own_embeddings else {}
    draft = make_tiny_draft(target, draft_vocab_size=40, **narrow)
    draft.set_draft_vocabulary(torch.arange(5, 85, 2))
    draft.save_pretrained(tmp_path / "draft")
    resized = make_tiny_target(eos_token_id=[2, 5])
    resized.resize_token_embeddings(vocab_size)
    found = sentences(check_compatibility(resized, None, draft))
    assert f"`confu convert resize DRAFT --vocab_size {vocab_size} --output NEW`" in found
    arguments = ["convert", "resize", str(tmp_path / "draft"), "--output", str(tmp_path / "new")]
    assert cli.main([*arguments, f"--vocab_size={vocab_size}"]) == 0
    carried = load_draft(tmp_path / "new")
    assert check_compatibility(resized, None, tmp_path / "new") == []
    assert torch.equal(carried.draft_token_ids, draft.draft_token_ids)
    # On old tokens the rows of the resized target are those of the old one, and so are text and proposals.
    ids, options = torch.tensor([[1, 5, 9]]), {"max_new_tokens": 20, "do_sample": False}
    texts, statistics = [], []
    for model, assistant in ((target, draft), (resized, carried)):
        only_old = {"suppress_tokens": list(range(90, model.config.vocab_size))}
        texts.append(model.generate(ids, assistant_model=assistant, **options, **only_old))
        statistics.append(assistant.last_statistics.emitted)
    assert torch.equal(*texts) and statistics[0] == statistics[1]


def test_tokens_that_a_target_lost_cannot_be_carried_over(target):
    with pytest.raises(ValueError, match="proposes token 96, but a target of 90 tokens has none such"):
        resize_vocabulary(make_tiny_draft(target), 90)


def test_kinds_of_targets_that_no_draft_fits(target):
    draft = make_tiny_draft(target)
    assert "T5Config" in sentences([f for f in check_compatibility(T5Config(), None, draft) if f.is_error])
    chunked = Qwen3Config(**target.config.to_dict() | {"layer_types": ["chunked_attention"] * 5})
    assert "layers of type chunked_attention" in sentences(check_compatibility(chunked, None, draft))
    loaded = make_tiny_target(eos_token_id=[2, 5])
    loaded.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation='flash_attention_2'" in sentences(check_compatibility(loaded, None, draft))


def test_special_tokens_and_length(target):
    draft = make_tiny_draft(target)
    config = LlamaConfig(
        **target.config.to_dict() | {"eos_token_id": [2, 5, 7], "pad_token_id": 9, "max_position_embeddings": 4096}
    )
    warned = sentences(check_compatibility(config, None, draft), is_error=False)
    assert "`eos_token_id` is [2, 5], the target's [2, 5, 7]" in warned
    assert "`pad_token_id` is None, the target's 9" in warned and "bos_token_id" not in warned
    assert "`max_position_embeddings` is 512, the target's 4096" in warned


def test_a_draft_that_cannot_end(target):
    draft = make_tiny_draft(target, draft_vocab_size=40)
    draft.set_draft_vocabulary(torch.arange(10, 50))
    warned = sentences(check_compatibility(target, None, draft), is_error=False)
    assert "The target's `eos_token_id` [2, 5] is not in the draft's vocabulary" in warned
    draft.set_draft_vocabulary(torch.tensor([5, *range(10, 49)]))
    assert check_compatibility(target, None, draft) == []


# Files of the draft


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncate(folder) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


FAULTS = {
    "truncated": (truncate, ["are damaged or incomplete"]),
    "missing, unexpected and misshapen": (
        lambda folder: edit_weights(
            folder,
            lambda w: (w.pop("norm.weight"), w.update({"fc.bias": w["fc.weight"][0].clone(), "t2d": w["t2d"][:9]})),
        ),
        ["lacks the weights norm.weight;", "holds the weights fc.bias,", "t2d is (9,), expected (97,)"],
    ),
    "another size": (
        lambda folder: edit(folder / "config.json", intermediate_size=80),
        ["layers.0.mlp.down_proj.weight is (32, 64), expected (32, 80)"],
    ),
    "contradiction": (
        lambda folder: edit(folder / "config.json", target_hidden_state_indices=[4, 2, 1]),
        ["its config cannot be that of a draft.", "is [4, 2, 1]; it must be a non-empty list of rising"],
    ),
    "offsets": (
        lambda folder: edit_weights(folder, lambda w: w["d2t"][7:8].add_(50)),
        ["`d2t` leads to 1 of 40 tokens out of order"],
    ),
    "not finite": (
        lambda folder: edit_weights(folder, lambda w: w["fc.weight"][3].fill_(torch.nan)),
        ["fc.weight hold numbers that are not finite"],
    ),
    "knobs": (
        lambda folder: edit(folder / "generation_config.json", confu_tree_sise=4),
        ["The draft's generation config:"],
    ),
}


@pytest.mark.parametrize("damage, expected", FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_draft(target, folder, damage, expected):
    damage(folder)
    found = sentences(check_compatibility(target, None, folder))
    assert all(sentence in found for sentence in expected), found


def test_a_draft_without_a_map_is_whole_if_it_predicts_every_token(target, tmp_path):
    make_tiny_draft(target).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: (weights.pop("d2t"), weights.pop("t2d")))
    assert check_compatibility(target, None, tmp_path) == []


def test_unknown_knobs(target, folder):
    edit(folder / "generation_config.json", confu_tree_sise=4)
    assert "The draft's generation config:" in sentences(check_compatibility(target, None, folder))


def test_drafts_of_other_libraries_are_told_how_to_come_in(target, tmp_path):
    """Not filled up with random weights, as Transformers does with checkpoints of other models."""
    Source("flat", (1, 2, 4)).write(tmp_path)
    with pytest.raises(ValueError, match="of type 'llama', expected 'confu'"):
        ConFuDraftModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no draft that can be read .*`confu convert in`"):
        load_draft(str(tmp_path), torch.float32)
    assert "of type 'llama', expected 'confu'; EAGLE-3 drafts of other libraries become ConFu drafts by `confu " in (
        sentences(check_compatibility(target, None, tmp_path))
    )


# Tokenizers


def test_tokenizers(target, folder):
    swapped = {f"word{i}": i for i in range(97)} | {"word3": 4, "word4": 3}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(swapped, unk_token="word0")))
    other.chat_template = "{{ messages[0]['content'] }}"
    assert "gives 2 tokens other ids than the target's (word3, word4)" in sentences(
        check_compatibility(target, other, folder)
    )
    template = sentences(check_compatibility(target, make_tokenizer(template="{{ 0 }}"), folder), is_error=False)
    assert "The chat template in" in template
    larger = sentences(check_compatibility(target, make_tokenizer(99), make_tiny_draft(target)))
    assert "token ids up to 98, but draft and target know 0..96" in larger


def test_a_tokenizer_that_cannot_read_what_it_renders(target, monkeypatch):
    """As mistral-common's: its conversations begin with a mark that has no text."""
    draft, tokenizer = make_tiny_draft(target), make_tokenizer(template="{{ messages[0]['content'] }}")
    assert check_compatibility(target, tokenizer, draft) == []
    own = tokenizer.apply_chat_template

    def with_a_mark(messages, tokenize=True, **options):
        rendered = own(messages, tokenize=tokenize, **options)
        return {"input_ids": [1, *rendered["input_ids"]]} if tokenize else rendered

    monkeypatch.setattr(tokenizer, "apply_chat_template", with_a_mark)
    assert "take ids from `apply_chat_template(tokenize=True)`" in sentences(
        check_compatibility(target, tokenizer, draft), is_error=False
    )
    broken = make_tokenizer(template="{{ messages[0].nothing.nothing }}")
    assert "The chat template cannot write a conversation" in sentences(
        check_compatibility(target, broken, draft), is_error=False
    )


# The command


def test_the_command(target, folder, tmp_path, capsys):
    target.save_pretrained(tmp_path / "target")
    arguments = [str(tmp_path / "target"), str(folder)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out.endswith(f"{folder} fits {arguments[0]}.\n") and "has no tokenizer" in output.err
    make_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()  # not needed
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    edit(tmp_path / "target" / "config.json", vocab_size=98)
    assert main(arguments) == 1
    output = capsys.readouterr().out
    assert "error: The draft was made for a target with `vocab_size=97`" in output
    assert output.endswith(f"{folder} does not fit {arguments[0]}.\n")
    assert AutoConfig.from_pretrained(arguments[0]).vocab_size == 98
    assert cli.main(["check", "no/such/target", str(folder)]) == 1
