"""The draft network against EAGLE-3 written out row by row, its checkpoint, and its mixtures of experts."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from helpers import make_tiny_draft, make_tiny_target
from transformers_confu import ConFuCandidateGenerator, ConFuConfig, ConFuDraftModel
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.inference.modeling_confu import ConFuExpertMixture
from transformers_confu.inference.rounds import FixedRounds


PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture(scope="module")
def target():
    return make_tiny_target()


# Names and shapes


def eagle3_shapes(config: ConFuConfig) -> dict[str, tuple[int, ...]]:
    """EAGLE-3's parameters and buffers as SafeAILab and vLLM write them, with `layers.0` for `midlayer`."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    return {
        "fc.weight": (width, len(config.target_hidden_state_indices) * config.target_hidden_size),
        "layers.0.self_attn.q_proj.weight": (heads, 2 * width),
        "layers.0.self_attn.k_proj.weight": (kv_heads, 2 * width),
        "layers.0.self_attn.v_proj.weight": (kv_heads, 2 * width),
        "layers.0.self_attn.o_proj.weight": (width, heads),
        "layers.0.mlp.gate_proj.weight": (inner, width),
        "layers.0.mlp.up_proj.weight": (inner, width),
        "layers.0.mlp.down_proj.weight": (width, inner),
        "layers.0.input_layernorm.weight": (width,),
        "layers.0.hidden_norm.weight": (width,),
        "layers.0.post_attention_layernorm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (config.draft_vocab_size, width),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("overrides", [{}, {"hidden_size": 24, "head_dim": 6}], ids=["same width", "narrow"])
def test_without_the_future_channel_a_draft_is_an_eagle_3_checkpoint(kind, overrides):
    draft = make_tiny_draft(make_tiny_target(kind), draft_vocab_size=60, **overrides)
    state = {name: tuple(value.shape) for name, value in draft.state_dict().items()}
    core = {name: shape for name, shape in state.items() if not name.startswith("future_channel.")}
    expected = eagle3_shapes(draft.config)
    if overrides:
        expected["embed_tokens.weight"] = (97, 24)
    assert core == expected
    assert draft.d2t.dtype == torch.int64 and draft.t2d.dtype == torch.bool
    assert (draft.get_input_embeddings() is None) == (not overrides)
    assert draft.get_output_embeddings() is draft.lm_head


def test_an_untrained_channel_adds_nothing_to_the_residual_stream(target):
    draft = ConFuDraftModel(ConFuConfig.from_target(target.config, num_soft_prompts=2))
    assert not draft.future_channel.future_residual.weight.any()
    assert draft.future_channel.soft_prompts.std() > 0 and draft.future_channel.future_token.experts.std() > 0


# The forward


class NaiveEagle3:
    """EAGLE-3's step for one row at a time: no cache, no batch, every head and position by itself."""

    def __init__(self, draft: ConFuDraftModel):
        self.weights, self.config = draft.state_dict(), draft.config

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean() + self.config.rms_norm_eps).sqrt() * self.weights[f"{name}.weight"]

    def rotate(self, head: torch.Tensor, position: int) -> torch.Tensor:
        """Rotary embedding as multiplication by complex numbers; the halves are real and imaginary parts."""
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(head[:half], head[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])

    def heads(self, x: torch.Tensor, name: str) -> list[torch.Tensor]:
        return list((self.weights[f"layers.0.self_attn.{name}.weight"] @ x).split(self.config.head_dim))

    def attention_input(self, embedding: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [self.norm(embedding, "layers.0.input_layernorm"), self.norm(feature, "layers.0.hidden_norm")]
        )

    def key(self, embedding: torch.Tensor, feature: torch.Tensor, position: int) -> list[torch.Tensor]:
        return [self.rotate(h, position) for h in self.heads(self.attention_input(embedding, feature), "k_proj")]

    def future(self, f: torch.Tensor, routed_by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embedding and feature of `[f]`, and what f adds to the residual stream."""
        channel = {name.removeprefix("future_channel."): value for name, value in self.weights.items()}
        residual = channel.get("future_residual.weight")
        embedding = naive_mixture(
            self.norm(routed_by, "future_channel.future_token.norm"),
            channel["future_token.router.weight"],
            channel["future_token.experts"],
            self.config.num_future_experts_per_token,
        )
        return (
            embedding,
            channel["future_projection.weight"] @ f,
            torch.zeros(self.config.hidden_size, dtype=f.dtype) if residual is None else residual @ f,
        )

    def step(self, rows, seen, row, future=None):
        """
        Args:
            rows: (embedding, feature, position) of every row.
            seen: Indices of the rows that `row`, one of them, sees.
        """
        embedding, feature, position = rows[row]
        query = [self.rotate(h, position) for h in self.heads(self.attention_input(embedding, feature), "q_proj")]
        keys = [self.key(*rows[index]) for index in seen]
        values = [self.heads(self.attention_input(*rows[index][:2]), "v_proj") for index in seen]
        stream = feature
        if future is not None:
            f_embedding, f_feature, f_residual = future
            keys.append(self.key(f_embedding, f_feature, position + 1))
            values.append(self.heads(self.attention_input(f_embedding, f_feature), "v_proj"))
            stream = stream + f_residual
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        attended = []
        for head, q in enumerate(query):
            scores = torch.stack([q @ key[head // group] / math.sqrt(self.config.head_dim) for key in keys])
            attended.append(sum(p * v[head // group] for p, v in zip(scores.softmax(0), values, strict=True)))
        after = stream + self.weights["layers.0.self_attn.o_proj.weight"] @ torch.cat(attended)
        inner = self.norm(after, "layers.0.post_attention_layernorm")
        mlp = {name: self.weights[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        feature = after + mlp["down"] @ (torch.nn.functional.silu(mlp["gate"] @ inner) * (mlp["up"] @ inner))
        return self.weights["lm_head.weight"] @ self.norm(feature, "norm"), feature


def naive_mixture(normed: torch.Tensor, router: torch.Tensor, experts: torch.Tensor, k: int) -> torch.Tensor:
    """Gated sum of the k most probable experts; the gates sum to 1 if k > 1 and are the probability if k = 1."""
    logits = [(normed @ row).item() for row in router]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    chosen = sorted(range(len(logits)), key=lambda i: -probabilities[i])[:k]
    total = sum(probabilities[i] for i in chosen) if k > 1 else 1.0
    return sum(probabilities[i] / total * experts[i] for i in chosen)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "overrides",
    [
        None,
        {},
        {"use_future_residual": False},
        {"num_future_experts": 3, "num_future_experts_per_token": 1},
        {"hidden_size": 24, "head_dim": 6},
    ],
    ids=["without f", "with f", "without residual", "one expert", "narrow"],
)
def test_forward_with_a_cache_is_eagle_3_written_out(target, overrides, implementation):
    draft = make_tiny_draft(target, **(overrides or {}))
    draft.set_attn_implementation(implementation)
    naive, width = NaiveEagle3(draft), draft.config.hidden_size
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    positions = [4, 5, 6, 7, 8]  # left padding: positions start anywhere
    rows = [(draw(width), draw(width), position) for position in positions]
    future = slot = None
    with torch.no_grad():
        if overrides is not None:
            f, routed_by = draw(draft.config.future_size), draw(width)
            future = draft.future(f[None, None], routed_by[None, None])
            slot = naive.future(f, routed_by)
        cache = DynamicCache()

        def run(new, **kwargs):
            return draft(
                inputs_embeds=torch.stack([row[0] for row in new])[None],
                features=torch.stack([row[1] for row in new])[None],
                position_ids=torch.tensor([[row[2] for row in new]]),
                cache=cache,
                future=future,
                **kwargs,
            )

        # True rows: the first three, then two more; the newest starts the tree.
        run(rows[:3], num_queries=1)
        output = run(rows[3:], num_queries=1)
        logits, feature = naive.step(rows, range(5), 4, slot)
        assert output.logits.shape == (1, 1, 97) and output.cache is cache
        assert close(output.logits[0, 0], logits) and close(output.features[0, 0], feature)

        # Two siblings read the row's feature; neither sees the other.
        rows += [(draw(width), output.features[0, 0], 9), (draw(width), output.features[0, 0], 9)]
        hidden = torch.finfo(torch.float64).min
        mask = torch.zeros(1, 1, 2, 7, dtype=torch.float64)
        mask[0, 0, 0, 6] = mask[0, 0, 1, 5] = hidden
        output = run(rows[5:], attention_mask=mask)
        for sibling, row in enumerate((5, 6)):
            logits, feature = naive.step(rows, [0, 1, 2, 3, 4, row], row, slot)
            assert close(output.logits[0, sibling], logits) and close(output.features[0, sibling], feature)

        # And one row below the second sibling.
        rows.append((draw(width), output.features[0, 1], 10))
        mask = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
        mask[..., 5] = hidden
        output = run(rows[7:], attention_mask=mask)
        logits, feature = naive.step(rows, [0, 1, 2, 3, 4, 6, 7], 7, slot)
        assert close(output.logits[0, 0], logits) and close(output.features[0, 0], feature)
    assert cache.get_seq_length() == 8  # rows only: the slot of f is never stored


def test_stored_rows_do_not_depend_on_f(target):
    """With f off, on, and another one."""
    draft = make_tiny_draft(target)
    embeddings, features = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for scale in (None, 1.0, 2.0):
            future = scale and draft.future(scale * torch.ones(1, 1, 64).double(), torch.ones(1, 1, 32).double())
            cache = DynamicCache()
            output = draft(embeddings, features, torch.arange(5)[None], None, cache, future, num_queries=1)
            outputs.append((output.logits, cache.layers[0].keys, cache.layers[0].values))
    without, first, second = outputs
    assert not torch.equal(without[0], first[0]) and not torch.equal(first[0], second[0])  # f is heard
    for stored in (1, 2):
        assert torch.equal(without[stored], first[stored]) and torch.equal(first[stored], second[stored])


# Checkpoints


def test_a_checkpoint_survives_the_disk(target, tmp_path):
    draft = make_tiny_draft(target, draft_vocab_size=40)
    draft.set_draft_vocabulary(torch.arange(0, 97, 2)[:40])
    draft.save_pretrained(tmp_path)
    loaded, info = ConFuDraftModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.dtype == torch.float64 and not loaded.training
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    for name, value in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.instance_id != draft.instance_id  # its state is not that of another draft


def test_default_knobs_of_a_draft_survive_the_disk(tmp_path):
    """Also where the checkpoint that was loaded had none, as a converted EAGLE-3 draft has."""
    made = make_tiny_draft(make_tiny_target(eos_token_id=[5, 6]))
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for draft in (made, ConFuDraftModel.from_pretrained(tmp_path)):
        draft.generation_config.confu_tree_size = 16
        draft.save_pretrained(tmp_path)
        ConFuDraftModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
        config = ConFuDraftModel.from_pretrained(tmp_path).generation_config
        assert (config.confu_tree_size, config.eos_token_id) == (16, [5, 6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(target, tmp_path, dtype):
    make_tiny_draft(target, torch.float32, draft_vocab_size=40).save_pretrained(tmp_path)
    loaded = ConFuDraftModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32  # bf16 frequencies would turn far positions wrongly
    assert loaded.d2t.dtype == torch.int64 and loaded.t2d.dtype == torch.bool
    assert torch.equal(
        target.generate(PROMPT, assistant_model=loaded, max_new_tokens=12), target.generate(PROMPT, max_new_tokens=12)
    )


def test_buffers_that_a_checkpoint_lacks_are_initialised(target, tmp_path):
    """EAGLE-3 drafts of the full vocabulary are saved without d2t and t2d, and no checkpoint holds inv_freq."""
    draft = make_tiny_draft(target)
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name not in ("d2t", "t2d")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded = ConFuDraftModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.draft_token_ids, torch.arange(97)) and loaded.t2d.all()
    expected = [10000 ** (-i / 4) for i in range(4)]
    assert loaded.rotary_emb.inv_freq.tolist() == pytest.approx(expected)
    assert loaded.rotary_emb.original_inv_freq.tolist() == pytest.approx(expected)


# The draft vocabulary


def test_a_draft_vocabulary_maps_both_ways(target):
    draft = make_tiny_draft(target, draft_vocab_size=4)
    assert draft.draft_token_ids.tolist() == [0, 1, 2, 3] and draft.t2d.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    for token_ids in ([96, 5, 9, 0], torch.tensor([0, 5, 9, 96])):
        draft.set_draft_vocabulary(token_ids)
        assert draft.draft_token_ids.tolist() == [0, 5, 9, 96] == draft.t2d.nonzero()[:, 0].tolist()
        assert draft.d2t.tolist() == [0, 4, 7, 93]


@pytest.mark.parametrize(
    "token_ids, found",
    [
        ([1, 2, 3], "got 3 in 1..3."),
        ([1, 2, 3, 3], "got 3 in 1..3."),
        ([1, 2, 3, 4, 5], "got 5 in 1..5."),
        ([1, 2, 3, 97], "got 4 in 1..97."),
        ([-1, 2, 3, 4], "got 4 in -1..4."),
        ([], "got 0."),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(target, token_ids, found):
    draft = make_tiny_draft(target, draft_vocab_size=4)
    with pytest.raises(ValueError, match=r"A draft vocabulary of 4 needs 4 distinct token ids in 0..96, ") as error:
        draft.set_draft_vocabulary(torch.tensor(token_ids, dtype=torch.long))
    assert str(error.value).endswith(found)
    assert draft.draft_token_ids.tolist() == [0, 1, 2, 3]  # left as it was


# Mixtures of experts


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_mixture_is_its_formula(k):
    torch.manual_seed(0)
    mixture = ConFuExpertMixture(6, num_experts=4, num_experts_per_token=k, size=5, eps=1e-6).double()
    torch.nn.init.normal_(mixture.experts)
    torch.nn.init.normal_(mixture.norm.weight)
    hidden_states = torch.randn(2, 3, 6, dtype=torch.float64) * 3
    output = mixture(hidden_states)
    assert output.shape == (2, 3, 5) and mixture.route(hidden_states)[0].dtype == torch.float32
    for row, got in zip(hidden_states.flatten(0, 1), output.flatten(0, 1), strict=True):
        normed = row / (row.square().mean() + 1e-6).sqrt() * mixture.norm.weight
        expected = naive_mixture(normed, mixture.router.weight, mixture.experts, k)
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_a_mixture_teaches_router_and_chosen_experts(k):
    torch.manual_seed(0)
    mixture = ConFuExpertMixture(6, num_experts=4, num_experts_per_token=k, size=5, eps=1e-6)
    torch.nn.init.normal_(mixture.experts)
    hidden_states = torch.randn(1, 6)
    _, chosen = mixture.route(hidden_states)
    mixture(hidden_states).square().sum().backward()
    taught = mixture.experts.grad.abs().sum(-1) > 0
    assert taught.nonzero()[:, 0].tolist() == sorted(chosen[0].tolist())
    assert mixture.router.weight.grad.abs().sum() > 1e-3
    assert mixture.norm.weight.grad.abs().sum() > 0


# A window of the text


@pytest.mark.parametrize("contemplation", [0, 1])
@pytest.mark.parametrize("window", [1, 5, 30])
def test_a_draft_with_a_window_proposes_as_if_the_tokens_before_it_were_not_there(target, window, contemplation):
    plain, cut = make_tiny_draft(target), make_tiny_draft(target, attention_window=window)
    random = torch.Generator().manual_seed(0)
    taps = torch.randn(1, 24, plain.config.taps_size, generator=random, dtype=plain.dtype)
    tokens = torch.randint(97, (1, 24), generator=random)
    future = torch.randn(1, plain.config.future_size, generator=random, dtype=plain.dtype) if contemplation else None
    rounds = FixedRounds(ConFuKnobs(tree_size=9, depth=3, branching=3))

    def observe(generator, rows):
        embeds = target.get_input_embeddings()(tokens[:, rows])
        generator.observe(embeds, taps[:, rows], torch.tensor([rows]))

    whole, trees = ConFuCandidateGenerator(cut, target), []
    for first, last in ((0, 9), (9, 10), (10, 24)):  # round after round
        observe(whole, list(range(first, last)))
        read = ConFuCandidateGenerator(plain, target)  # keys and values of a row follow from that row alone
        observe(read, [row for row in range(last) if row < 4 or row >= last - window])
        trees = [generator.propose(tokens[:, last - 1], rounds, 3, future) for generator in (whole, read)]
        assert torch.equal(trees[0].tokens, trees[1].tokens)
        torch.testing.assert_close(trees[0].log_probs, trees[1].log_probs)
