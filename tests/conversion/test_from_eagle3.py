"""Drafts of every form against EAGLE-3 written out, and decoding with them against plain `generate`."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from eagle3_source import Source, reference_logits
from helpers import make_tiny_target
from transformers_confu import ConFuCandidateGenerator, ConFuDraftModel, confu_generation_config
from transformers_confu.conversion import convert_eagle3


PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 8, 9]])


TARGETS = {kind: make_tiny_target(kind, num_hidden_layers=8) for kind in ("llama", "qwen3")}
QWEN_TABLE = TARGETS["qwen3"].get_input_embeddings().weight.detach().clone()


def own_table(width: int) -> torch.Tensor:
    return torch.randn(97, width, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


FLAT, SPECULATORS = partial(Source, "flat"), partial(Source, "speculators")
BY_DEFAULT = {"says_taps": False, "norm_before_residual": True, "says_norm_before_residual": False}
SWITCHES = {"norm_output": True, "norm_before_fc": True, "qk_norm": True, "new_rope_words": True, "linear_factor": 2.0}
DEEPSPEC = Source("deepspec", (1, 2, 4, 6, 8), draft_vocab_size=None, qk_norm=True, head_dim=12, embeddings=QWEN_TABLE)
LINEAR = FLAT((2, 4, 6), norm_before_fc=True, bias=True, linear_factor=4.0)
SOURCES = {
    "SafeAILab": ("llama", "bin", FLAT((2, 4, 5), says_taps=False)),
    "SGLang, heads of another size": ("llama", "shards", FLAT((1, 4, 7), head_dim=14, num_heads=3, num_kv_heads=1)),
    "narrow": ("llama", "safetensors", FLAT((2, 4, 6), hidden_size=24, head_dim=10, embeddings=own_table(24))),
    "five taps": ("llama", "safetensors", FLAT((0, 2, 3, 5, 7))),
    "EAGLE-3.1": ("llama", "safetensors", FLAT((2, 4, 6), fc_norm=True, norm_output=True)),
    "norm before fc, biases, linear RoPE": ("qwen3", "safetensors", LINEAR),
    "speculators": ("qwen3", "safetensors", SPECULATORS((2, 4, 5), **BY_DEFAULT, embeddings=QWEN_TABLE)),
    "its switches": ("qwen3", "shards", SPECULATORS((1, 2, 6), **SWITCHES, hidden_size=40, embeddings=own_table(40))),
    "DeepSpec": ("qwen3", "safetensors", DEEPSPEC),
}


@pytest.fixture(params=SOURCES, scope="module")
def case(request, tmp_path_factory):
    """A source, its target, and the converted draft."""
    kind, files, source = SOURCES[request.param]
    target = TARGETS[kind]
    folder = source.write(tmp_path_factory.mktemp("source"), files)
    return source, target, convert_eagle3(folder, target, num_soft_prompts=3)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    # Transformers' norms and rotary embeddings are computed in float32.
    return torch.allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_a_converted_draft_computes_what_its_source_computes(case):
    source, _, draft = case
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    rows, drafted, first_position = 6, 3, 40
    hidden_states = [draw(rows, source.target_hidden_size) for _ in range(source.num_target_layers + 1)]
    embeds = draw(rows + drafted, source.hidden_size)
    expected = reference_logits(source, hidden_states, embeds, first_position)

    taps = torch.cat([hidden_states[index] for index in draft.config.target_hidden_state_indices], dim=-1)[None]
    cache = DynamicCache()
    positions = first_position + torch.arange(rows)[None]
    output = draft(embeds[None, :rows], draft.fuse_taps(taps), positions, cache=cache, num_queries=1)
    logits = [output.logits[0, 0]]
    for step in range(drafted):
        row = rows + step
        position = torch.tensor([[first_position + row]])
        output = draft(embeds[None, row, None], output.features, position, cache=cache)
        logits.append(output.logits[0, 0])
    assert close(torch.stack(logits), expected)


@torch.no_grad()
def test_a_converted_draft_proposes_what_its_source_proposes(case, monkeypatch):
    """The first chain that decoding drafts: taps of the right layers, rows at the right place, tokens mapped back."""
    source, target, draft = case
    hidden_states = target(PROMPT, output_hidden_states=True).hidden_states
    token = int(target(PROMPT).logits[0, -1].argmax())
    table = target.get_input_embeddings().weight if source.embeddings is None else source.embeddings
    offsets = source.weights().get("d2t")
    tokens = [*PROMPT[0, 1:].tolist(), token]
    for _ in range(3):
        embeds = table[torch.tensor(tokens)]
        choice = int(reference_logits(source, [states[0] for states in hidden_states], embeds)[-1].argmax())
        tokens.append(choice if offsets is None else choice + int(offsets[choice]))

    proposed = []
    propose = ConFuCandidateGenerator.propose

    def spy(self, *args, **kwargs):
        tree = propose(self, *args, **kwargs)
        proposed.append(tree.tokens[0].tolist())
        return tree

    monkeypatch.setattr(ConFuCandidateGenerator, "propose", spy)
    knobs = {"confu_tree_size": 4, "confu_branching": 1, "confu_depth": 3}
    for contemplation in ({}, {"confu_contemplation": 4}):  # EAGLE-3 mode by its own config, and the new channel
        config = confu_generation_config(target, max_new_tokens=9, do_sample=False, **knobs, **contemplation)
        text = target.generate(PROMPT, assistant_model=draft, generation_config=config)
        assert torch.equal(text, target.generate(PROMPT, max_new_tokens=9, do_sample=False))
    assert proposed[0] == tokens[-4:]


def test_every_weight_is_taken_over_bit_by_bit_and_survives_the_disk(case, tmp_path):
    source, _, draft = case
    draft.save_pretrained(tmp_path)
    loaded = ConFuDraftModel.from_pretrained(tmp_path)
    assert loaded.generation_config.confu_contemplation == 0
    weights = source.weights()
    if not draft.config.has_own_embeddings:
        weights.pop("embed_tokens.weight", None)
    for model in (draft, loaded):
        state = model.state_dict()
        core = {name for name in state if not name.startswith("future_channel.")}
        assert core - {"d2t", "t2d"} == weights.keys() - {"d2t", "t2d"}
        for name, tensor in weights.items():
            assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert torch.equal(loaded.future_channel.soft_prompts, draft.future_channel.soft_prompts)
