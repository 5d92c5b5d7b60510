"""Whether a draft fits a target: what is found, from configurations alone, and what the command says."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast, T5Config

from eagle3_source import Source
from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuConfig, ConFuDraftModel, cli
from transformers_confu.common.loading import load_draft
from transformers_confu.publishing.compatibility import check_compatibility


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


def errors(target, draft, tokenizer=None, kind: bool = True) -> str:
    findings = check_compatibility(target, tokenizer, draft)
    return " ".join(finding.sentence for finding in findings if finding.is_error == kind)


def warnings(target, draft, tokenizer=None) -> str:
    assert errors(target, draft, tokenizer) == ""
    return errors(target, draft, tokenizer, kind=False)


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


@pytest.mark.parametrize("kind", ["Gemma3n", "Gemma4", "Llava"])
def test_a_target_of_text_and_images(kind):
    """Nothing that reads images is needed; of Gemma 3n it would be a library of its own."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "head_dim": 8}
    if kind == "Gemma3n":
        sizes["num_kv_shared_layers"] = 0
    text_config = getattr(transformers, "LlamaConfig" if kind == "Llava" else f"{kind}TextConfig")(**sizes)
    config = getattr(transformers, f"{kind}Config")(text_config=text_config)
    draft = ConFuDraftModel(ConFuConfig.from_target(config))
    assert check_compatibility(config, None, draft) == []


OTHER_TARGETS = [
    ({"vocab_size": 98}, "`vocab_size=97`, but LlamaForCausalLM has 98"),
    ({"vocab_size": 98}, "`confu convert resize DRAFT --vocab_size 98 --output NEW`"),
    # A trillion parameters, if anything of it were made.
    ({"hidden_size": 1 << 15, "intermediate_size": 1 << 17}, "`hidden_size=32`, but LlamaForCausalLM has 32768"),
    ({"num_key_value_heads": 1}, "caches 1 key/value heads of size 8, but the draft's soft prompts"),
]


@pytest.mark.parametrize("changes, sentence", OTHER_TARGETS)
def test_another_target(target, changes, sentence):
    assert sentence in errors(LlamaConfig(**target.config.to_dict() | changes), make_tiny_draft(target))


def test_kinds_of_targets_that_no_draft_fits(target):
    draft = make_tiny_draft(target)
    assert "T5Config" in errors(T5Config(), draft)
    loaded = make_tiny_target(eos_token_id=[2, 5])
    loaded.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation='flash_attention_2'" in errors(loaded, draft)


def test_special_tokens_and_length(target):
    draft = make_tiny_draft(target, draft_vocab_size=40)
    draft.set_draft_vocabulary(torch.arange(10, 50))
    changes = {"eos_token_id": [2, 5, 7], "pad_token_id": 9, "max_position_embeddings": 4096}
    warned = warnings(LlamaConfig(**target.config.to_dict() | changes), draft)
    assert "`eos_token_id` is [2, 5], the target's [2, 5, 7]" in warned
    assert "`pad_token_id` is None, the target's 9" in warned and "bos_token_id" not in warned
    assert "`max_position_embeddings` is 512, the target's 4096" in warned
    assert "The target's `eos_token_id` [2, 5, 7] is not in the draft's vocabulary" in warned


# Files of the draft


def edit_weights(folder, **changes: torch.Tensor | None) -> None:
    """Give weights, with `__` for a full stop, other values, or none."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncate(folder) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


FAULTS = [
    (truncate, "are damaged or incomplete"),
    (lambda f: edit_weights(f, norm__weight=None), "lacks the weights norm.weight;"),
    (lambda f: edit_weights(f, fc__bias=torch.zeros(32)), "holds the weights fc.bias,"),
    (lambda f: edit(f / "config.json", intermediate_size=80), "mlp.down_proj.weight is (32, 64), expected (32, 80)"),
    (lambda f: edit(f / "config.json", target_hidden_state_indices=[4, 2, 1]), "config cannot be that of a draft."),
    (lambda f: edit_weights(f, d2t=torch.ones(40).long()), "`d2t` leads to 40 of 40 tokens out of order"),
    (lambda f: edit_weights(f, fc__weight=torch.full((32, 96), torch.nan)), "fc.weight hold numbers that are not fin"),
    (lambda f: edit(f / "generation_config.json", confu_tree_sise=4), "The draft's generation config:"),
]


@pytest.mark.parametrize("damage, sentence", FAULTS, ids=[sentence for _, sentence in FAULTS])
def test_a_faulty_draft(target, folder, damage, sentence):
    damage(folder)
    assert sentence in errors(target, folder)


def test_a_draft_without_a_map_is_whole_if_it_predicts_every_token(target, tmp_path):
    make_tiny_draft(target).save_pretrained(tmp_path)
    edit_weights(tmp_path, d2t=None, t2d=None)
    assert check_compatibility(target, None, tmp_path) == []


def test_drafts_of_other_libraries_are_told_how_to_come_in(target, tmp_path):
    """Not filled up with random weights, as Transformers does with checkpoints of other models."""
    Source("flat", (1, 2, 4)).write(tmp_path)
    with pytest.raises(ValueError, match="of type 'llama', expected 'confu'"):
        ConFuDraftModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no draft that can be read .*`confu convert in`"):
        load_draft(str(tmp_path), torch.float32)
    assert "EAGLE-3 drafts of other libraries become ConFu drafts by `confu convert in`" in errors(target, tmp_path)


# Tokenizers


def test_tokenizers(target, folder):
    swapped = {f"word{i}": i for i in range(97)} | {"word3": 4, "word4": 3}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(swapped, unk_token="word0")))
    assert "gives 2 tokens other ids than the target's (word3, word4)" in errors(target, folder, other)
    assert "The chat template in" in warnings(target, folder, make_tokenizer(template="{{ 0 }}"))
    larger = errors(target, make_tiny_draft(target), make_tokenizer(99))
    assert "token ids up to 98, but draft and target know 0..96" in larger


def test_a_tokenizer_that_cannot_read_what_it_renders(target, monkeypatch):
    """As mistral-common's: its conversations begin with a mark that has no text."""
    draft, tokenizer = make_tiny_draft(target), make_tokenizer()
    own = tokenizer.apply_chat_template

    def with_a_mark(messages, tokenize=True, **options):
        rendered = own(messages, tokenize=tokenize, **options)
        return {"input_ids": [1, *rendered["input_ids"]]} if tokenize else rendered

    assert check_compatibility(target, tokenizer, draft) == []
    monkeypatch.setattr(tokenizer, "apply_chat_template", with_a_mark)
    assert "take ids from `apply_chat_template(tokenize=True)`" in warnings(target, draft, tokenizer)
    broken = make_tokenizer(template="{{ messages[0].nothing.nothing }}")
    assert "The chat template cannot write a conversation" in warnings(target, draft, broken)


def test_the_command(target, folder, tmp_path, capsys):
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()  # not needed
    arguments = ["check", str(tmp_path / "target"), str(folder)]
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    assert output.out.endswith(f"{folder} fits {arguments[1]}.\n") and "has no tokenizer" in output.err
    make_tokenizer().save_pretrained(tmp_path / "target")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    edit(tmp_path / "target" / "config.json", vocab_size=98)
    assert cli.main(arguments) == 1
    output = capsys.readouterr().out
    assert "error: The draft was made for a target with `vocab_size=97`" in output
    assert output.endswith(f"{folder} does not fit {arguments[1]}.\n")
