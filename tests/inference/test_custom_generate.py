"""Route C: the draft of a repository by its name alone, `generate(custom_generate="org/repository")`."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GenerationConfig, GenerationMixin

from helpers import make_tiny_draft, make_tiny_target, word_tokenizer
from hub_stand_in import fill_hub_cache
from transformers_confu.publishing.publish import write_custom_generate


PROMPT = torch.tensor([[3, 4, 5, 2, 7]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}
TRUST = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def target():
    # So few tokens that a random draft is often right.
    return make_tiny_target(vocab_size=13)


@pytest.fixture(scope="module")
def plain(target):
    return target.generate(PROMPT, **GREEDY)


def save(draft, folder: Path, repo_id: str | None = None) -> Path:
    draft.save_pretrained(folder)
    write_custom_generate(folder, repo_id)
    return folder


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory) -> Path:
    return save(make_tiny_draft(target), tmp_path_factory.mktemp("checkpoints") / "draft")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """What is loaded by `AutoModel`, load by load; what was loaded in earlier tests stays loaded."""
    loaded = []
    native = AutoModel.from_pretrained.__func__

    def spy(cls, name, *args, **kwargs):
        loaded.append(name)
        return native(cls, name, *args, **kwargs)

    monkeypatch.setattr(AutoModel, "from_pretrained", classmethod(spy))
    return loaded


@pytest.fixture
def assistants(monkeypatch) -> list:
    """The draft of each call of `generate`."""
    used = []
    native = GenerationMixin._assisted_decoding

    @functools.wraps(native)
    def spy(self, *args, **kwargs):
        used.append(kwargs["assistant_model"])
        return native(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", spy)
    return used


def same_as_plain(target, options: dict, custom_generate: str):
    """The output of route C, after comparing its ids and its use of the random generator with plain `generate`."""
    torch.manual_seed(0)
    expected = target.generate(PROMPT, **options)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    output = target.generate(PROMPT, **options, custom_generate=custom_generate, **TRUST)
    ids = [result if isinstance(result, torch.Tensor) else result.sequences for result in (output, expected)]
    assert torch.equal(*ids)
    assert torch.equal(torch.get_rng_state(), state)
    return output


def test_a_folder_is_loaded_once_and_writes_the_same_text(target, folder, loads):
    for options in (GREEDY, GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 5}):
        same_as_plain(target, options, custom_generate=str(folder))
    assert loads == [str(folder)]


def test_a_moved_and_renamed_folder_is_found_where_it_is(target, plain, folder, loads, tmp_path, monkeypatch):
    # Both folders hold the very same file, which Transformers therefore runs as one module.
    copies = [shutil.copytree(folder, tmp_path / name / "draft") for name in ("one", "two")]
    for copy in copies:
        assert torch.equal(target.generate(PROMPT, custom_generate=str(copy), **TRUST, **GREEDY), plain)
    copies[0].rename(tmp_path / "renamed")
    shutil.rmtree(copies[1])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(target.generate(PROMPT, custom_generate="renamed", **TRUST, **GREEDY), plain)
    assert loads == [*map(str, copies), str(tmp_path / "renamed")]


def test_what_changes_in_a_folder_is_loaded(target, plain, folder, loads, assistants, tmp_path):
    copy = str(shutil.copytree(folder, tmp_path / "draft"))
    for _ in range(2):
        target.generate(PROMPT, custom_generate=copy, **TRUST, **GREEDY)
    make_tiny_draft(target, seed=2).save_pretrained(copy)
    os.utime(tmp_path / "draft" / "model.safetensors", (0, 0))
    assert torch.equal(target.generate(PROMPT, custom_generate=copy, **TRUST, **GREEDY), plain)
    assert loads == [copy, copy]
    knobs = tmp_path / "draft" / "generation_config.json"
    knobs.write_text(json.dumps(json.loads(knobs.read_text()) | {"confu_tree_size": 2}))
    os.utime(knobs, (0, 0))
    assert torch.equal(target.generate(PROMPT, custom_generate=copy, **TRUST, **GREEDY), plain)
    assert assistants[-1].generation_config.confu_tree_size == 2


@pytest.mark.usefixtures("offline_hub")
def test_a_revision_pins_the_draft(target, plain, folder, loads, assistants, tmp_path):
    other = save(make_tiny_draft(target, seed=2), tmp_path / "other")
    commits = fill_hub_cache(tmp_path / "hub", "org/draft", {"main": folder, "v2": other})
    hub = {"cache_dir": tmp_path / "hub", "local_files_only": True, "custom_generate": "org/draft"}
    for revision in ({}, {"revision": "v2"}, {"revision": commits["v2"]}, {"revision": "v2"}):
        assert torch.equal(target.generate(PROMPT, **revision, **hub, **TRUST, **GREEDY), plain)
    assert loads == ["org/draft"] * 3
    main, by_name, by_hash, again = assistants
    assert again is by_name
    assert torch.equal(by_name.fc.weight, by_hash.fc.weight) and not torch.equal(by_name.fc.weight, main.fc.weight)


def test_an_assistant_model_goes_before_the_repositorys_draft(target, plain, folder, loads, assistants):
    draft = make_tiny_draft(target)
    ids = target.generate(PROMPT, custom_generate=str(folder), assistant_model=draft, **TRUST, **GREEDY)
    assert torch.equal(ids, plain)
    assert loads == [] and assistants == [draft]


@pytest.mark.usefixtures("offline_hub")
def test_the_published_id_helps_where_no_name_is_given(target, plain, folder, loads, tmp_path):
    generate = target.load_custom_generate(folder, **TRUST)
    with pytest.raises(ValueError, match="Which draft to load is not known: call `target.generate"):
        generate(target, inputs=PROMPT, **GREEDY)
    write_custom_generate(shutil.copytree(folder, tmp_path / "published"), "org/published")
    fill_hub_cache(tmp_path, "org/published", {"main": tmp_path / "published"})
    generate = target.load_custom_generate(tmp_path / "published", **TRUST)
    ids = generate(target, inputs=PROMPT, cache_dir=tmp_path, local_files_only=True, **GREEDY)
    assert torch.equal(ids, plain)
    assert loads == ["org/published"]


def test_a_repository_without_a_draft_says_so(target, tmp_path):
    target.save_pretrained(tmp_path)
    write_custom_generate(tmp_path)
    with pytest.raises(ValueError, match="holds a LlamaModel, which is no ConFu draft"):
        target.generate(PROMPT, custom_generate=str(tmp_path), **TRUST, **GREEDY)


# Every argument of `generate`


def test_stop_strings_processors_and_outputs(target, plain, folder):
    stop = GREEDY | {"stop_strings": f"t{plain[0, 11]}", "tokenizer": word_tokenizer()}
    assert same_as_plain(target, stop, custom_generate=str(folder)).shape[1] < plain.shape[1]

    def one_token_more_often(input_ids, scores):
        return scores + 3.0 * torch.eye(13)[4]

    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.3}
    options["logits_processor"] = [one_token_more_often]
    output = same_as_plain(target, options, custom_generate=str(folder))
    expected = target.generate(PROMPT, **options)
    assert not torch.equal(expected.sequences, plain)
    torch.testing.assert_close(output.scores, expected.scores, rtol=1e-12, atol=1e-12)


def test_knobs_travel_as_keywords(target, plain, folder, assistants):
    knobs = {"confu_tree_size": 2, "confu_contemplation": 1}
    assert torch.equal(target.generate(PROMPT, custom_generate=str(folder), **GREEDY, **knobs, **TRUST), plain)
    statistics = assistants[-1].last_statistics
    # Trees of 2 nodes, but for the last round if it has no room for a guess.
    assert statistics.rounds - 1 <= statistics.tree_nodes / 2 <= statistics.rounds
    assert statistics.contemplate_rows <= statistics.rounds


def test_a_keyword_changes_no_other_option(folder, plain):
    """Neither a given config, nor an option that is switched off by `None`."""
    target = make_tiny_target(vocab_size=13)
    target.generation_config.eos_token_id = int(plain[0, 9])
    options = {"custom_generate": str(folder), "confu_tree_size": 4, **TRUST}
    assert target.generate(PROMPT, **options, **GREEDY).shape[1] < plain.shape[1]
    assert torch.equal(target.generate(PROMPT, **options, **GREEDY, eos_token_id=None), plain)
    config = GenerationConfig(**GREEDY, eos_token_id=int(plain[0, 9]))
    before = config.to_dict()
    assert target.generate(PROMPT, **options, generation_config=config).shape[1] < plain.shape[1]
    assert config.to_dict() == before


def test_a_misspelt_knob_is_an_error(target, folder):
    with pytest.raises(ValueError, match="`confu_tre_size` is no knob of ConFu; did you mean `confu_tree_size`"):
        target.generate(PROMPT, custom_generate=str(folder), confu_tre_size=4, **TRUST, **GREEDY)
