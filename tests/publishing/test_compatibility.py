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


def test_a_large_target_is_checked_without_its_weights():
    """A trillion parameters, if anything of it were made."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=1 << 15, intermediate_size=1 << 17, num_hidden_layers=80, eos_token_id=3
    )
    draft = make_tiny_draft(make_tiny_target())
    assert "made for a target with `hidden_size=32`, but LlamaForCausalLM has 32768" in sentences(
        [f for f in check_compatibility(config, None, draft) if f.is_error]
    )


OTHER_TARGETS = {
    "vocabulary": ({"vocab_size": 98}, "`vocab_size=97`, but LlamaForCausalLM has 98"),
    "width": ({"hidden_size": 48}, "`hidden_size=32`, but LlamaForCausalLM has 48"),
    "depth": ({"num_hidden_layers": 6}, "`num_hidden_layers=5`, but LlamaForCausalLM has 6"),
    "cached heads": ({"num_key_value_heads": 1}, "caches 1 key/value heads of size 8, but the draft's soft prompts"),
    "head size": ({"head_dim": 16}, "caches 2 key/value heads of size 16"),
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


@pytest.mark.parametrize("vocab_size", [128, 90])
@pytest.mark.parametrize("own_embeddings", [False, True])
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
    windowed = Qwen3Config(
        **target.config.to_dict()
        | {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None, "sliding_window": 8}
    )
    assert "layers of type sliding_attention" in sentences(check_compatibility(windowed, None, draft))


def test_a_model_is_checked_as_it_is_loaded():
    target = make_tiny_target(eos_token_id=3)
    draft = make_tiny_draft(target)
    target.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation='flash_attention_2'" in sentences(check_compatibility(target, None, draft))


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


def test_a_truncated_draft(target, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "are damaged or incomplete" in sentences(check_compatibility(target, None, folder))


def test_missing_unexpected_and_misshapen_weights(target, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["norm.weight"]
    weights["fc.bias"] = torch.zeros(32, dtype=torch.float64)
    weights["lm_head.weight"] = weights["lm_head.weight"][:30].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = sentences(check_compatibility(target, None, folder))
    assert "lacks the weights norm.weight;" in found and "holds the weights fc.bias," in found
    assert "lm_head.weight is (30, 32), expected (40, 32)" in found


def test_a_config_that_lies(target, folder):
    edit(folder / "config.json", intermediate_size=80)
    assert "layers.0.mlp.down_proj.weight is (32, 64), expected (32, 80)" in sentences(
        check_compatibility(target, None, folder)
    )


def test_a_config_that_contradicts_itself(target, folder):
    edit(folder / "config.json", target_hidden_state_indices=[4, 2, 1])
    assert "`target_hidden_state_indices` is [4, 2, 1]; it must be a non-empty list of rising" in sentences(
        check_compatibility(target, None, folder)
    )
    with pytest.raises(ValueError, match="draft: its config cannot be that of a draft. .* rising, distinct indices"):
        load_draft(str(folder))


def test_wrong_offsets(target, folder):
    weights = load_file(folder / "model.safetensors")
    weights["d2t"][7] += 50
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "`d2t` leads to 1 of 40 tokens out of order" in sentences(check_compatibility(target, None, folder))


def test_numbers_that_are_not_finite(target, folder):
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "fc.weight hold numbers that are not finite" in sentences(check_compatibility(target, None, folder))


def test_a_draft_without_a_map_is_whole_if_it_predicts_every_token(target, tmp_path):
    make_tiny_draft(target).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["d2t"], weights["t2d"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
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
