"""`ConFuTrainer` on tiny targets: what is taught, saved, resumed, measured and refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from helpers import make_tiny_target
from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_tiny_target(dtype=torch.float32)


def make_draft(target: PreTrainedModel, seed: int = 0, **overrides) -> ConFuDraftModel:
    settings = {"target_hidden_state_indices": [1, 2, 4], "num_soft_prompts": 4, "draft_vocab_size": 60}
    torch.manual_seed(seed)
    return ConFuDraftModel(ConFuConfig.from_target(target.config, **(settings | overrides)))


def make_rows(target: PreTrainedModel, lengths: list[int], prompt: int = 4, seed: int = 0) -> Dataset:
    """Greedy answers of the target to random prompts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(97, (len(lengths), prompt), generator=generator)
    texts = target.generate(prompts, do_sample=False, max_new_tokens=max(lengths) - prompt).tolist()
    ids = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * prompt + text[prompt:] for text in ids]})


@pytest.fixture(scope="module")
def rows(target) -> Dataset:
    return make_rows(target, [12, 30, 18, 24, 9, 30, 15, 21, 27, 10])


def make_trainer(target: PreTrainedModel, folder: Path, draft: ConFuDraftModel | None = None, **settings):
    names = ("train_dataset", "eval_dataset", "processing_class", "callbacks", "compute_metrics")
    of_trainer = {name: settings.pop(name) for name in names if name in settings}
    arguments = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "tokens_per_batch": 64,
        "ttt_steps": 3,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return ConFuTrainer(
        model=make_draft(target) if draft is None else draft,
        target_model=target,
        args=ConFuTrainingArguments(**(arguments | settings)),
        **of_trainer,
    )


def weights(draft: ConFuDraftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}


def logged(trainer: ConFuTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


# Learning


@pytest.mark.parametrize("stage", ["core", "joint"])
def test_the_loss_falls(target, rows, tmp_path, stage):
    # All rows in one batch.
    settings = {"tokens_per_batch": 1024, "max_steps": 12, "learning_rate": 2e-2, "stage": stage}
    trainer = make_trainer(target, tmp_path, train_dataset=rows, **settings)
    before = weights(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    coverage = logged(trainer, "future_coverage")
    assert all(share == 0 for share in coverage) if stage == "core" else min(coverage) > 0.5
    assert len(logged(trainer, "accuracy_2")) == len(logged(trainer, "tau_greedy")) == 12
    for name, value in weights(trainer.model).items():
        taught = stage == "joint" or not name.startswith("future_channel.")
        assert torch.equal(value, before[name]) != taught, name


def test_bf16_reaches_the_draft(target, rows, tmp_path):
    trainer = make_trainer(target, tmp_path, train_dataset=rows, eval_dataset=rows, max_steps=1, bf16=True)
    seen = set()
    trainer.model.fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.evaluate()
    trainer.train()
    assert seen == {torch.bfloat16}


def test_the_target_stays_as_it_was(rows, tmp_path):
    target = make_tiny_target(dtype=torch.float32).train()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    trainer = make_trainer(target, tmp_path, train_dataset=rows, max_steps=2, weight_decay=0.1)
    trainer.train()
    assert not target.training
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.parameters())


GROUPS = {
    "contemplate": ("future_channel.soft_prompts", "future_channel.contemplate_token."),
    "future": ("future_channel.future_",),
    "core": ("fc.", "layers.", "norm.", "lm_head."),
}


@pytest.mark.parametrize("use_muon", [False, True])
def test_the_future_channel_learns_at_its_own_rate(target, rows, tmp_path, use_muon):
    settings = {"train_dataset": rows, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1}
    common, own = (
        make_trainer(target, tmp_path, use_muon=use_muon, **settings, **rates)
        for rates in ({}, {"channel_learning_rate": 0.4})
    )
    before = weights(common.model)
    for trainer in (common, own):
        trainer.train()
    assert logged(own, "learning_rate") == [0.1]
    for name, value in weights(own.model).items():
        factor = 4 if name.startswith("future_channel.") else 1
        step = weights(common.model)[name] - before[name]
        torch.testing.assert_close(value - before[name], factor * step, rtol=1e-3, atol=1e-6, msg=name)


def test_muon_trains_the_matrices_within_the_draft_alone(target, rows, tmp_path):
    settings = {"train_dataset": rows, "max_steps": 1, "max_grad_norm": 0}
    without, beside = (make_trainer(target, tmp_path, use_muon=use_muon, **settings) for use_muon in (False, True))
    for trainer in (without, beside):
        trainer.train()
    of_adamw, of_both = weights(without.model), weights(beside.model)
    changed = {name for name, value in of_both.items() if not torch.equal(value, of_adamw[name])}
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    channel = ["contemplate_token.router", "future_token.router", "future_projection", "future_residual"]
    names = ["fc", *(f"layers.0.{name}" for name in layer), *(f"future_channel.{name}" for name in channel)]
    assert changed == {f"{name}.weight" for name in names}


@pytest.mark.parametrize("frozen", [["core"], ["contemplate", "future"]])
def test_frozen_groups_stay(target, rows, tmp_path, frozen):
    trainer = make_trainer(target, tmp_path, train_dataset=rows, max_steps=2, weight_decay=0.1, frozen=frozen)
    before = weights(trainer.model)
    trainer.train()
    for name, value in weights(trainer.model).items():
        is_frozen = name.startswith(sum((GROUPS[group] for group in frozen), ()))
        assert torch.equal(value, before[name]) == is_frozen, name


def test_a_target_is_given_by_name_or_as_a_peft_model(target, rows, tmp_path, saved_target, monkeypatch):
    monkeypatch.setattr("transformers_confu.training.trainer.default_dtype", lambda device: "float32")
    named = make_trainer(str(saved_target), tmp_path, make_draft(target), eval_dataset=rows)
    ids = torch.tensor([[3, 14, 15]])
    assert torch.equal(named.target_model(ids).logits, target(ids).logits)
    assert not any(parameter.requires_grad for parameter in named.target_model.parameters())

    adapted = get_peft_model(
        make_tiny_target(dtype=torch.float32), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = adapted.eval()(ids).logits
    assert not torch.allclose(expected, target(ids).logits)
    trainer = make_trainer(adapted, tmp_path, make_draft(target), train_dataset=rows, eval_dataset=rows, max_steps=1)
    assert torch.equal(trainer.target_model(ids).logits, expected)
    assert trainer.evaluate()["eval_loss"] != named.evaluate()["eval_loss"]
    trainer.train()


def test_logged_metrics_are_those_of_the_steps_since_the_last_log(target, rows, tmp_path):
    every, third = (
        make_trainer(target, tmp_path, train_dataset=rows, max_steps=6, logging_steps=n, tokens_per_batch=32)
        for n in (1, 3)
    )
    for trainer in (every, third):
        torch.manual_seed(0)
        trainer.train()
    losses = logged(every, "loss")
    assert logged(third, "loss") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)
    shares = logged(every, "accuracy_0")
    for group, share in enumerate(logged(third, "accuracy_0")):
        of_group = shares[3 * group : 3 * group + 3]
        assert min(of_group) <= share <= max(of_group)


# The size of a step


def gradient_of_one_step(target: PreTrainedModel, folder: Path, dataset: Dataset, **settings) -> dict:
    """Gradients as the optimiser sees them in the only step of an epoch."""
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            assert not gradients
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer = make_trainer(
        target, folder, train_dataset=dataset, num_train_epochs=1, max_grad_norm=0, callbacks=[Keep()], **settings
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return gradients | {"loss": torch.tensor(logged(trainer, "loss"))}


@pytest.mark.parametrize("stage", ["joint", "core", "contemplation"])
def test_accumulated_small_batches_are_one_large_batch(target, tmp_path, stage):
    # The loss is the sum over rows and steps, divided by the draft rows of all accumulated batches together: the
    # same step, whatever the batches, even of unequal content.
    dataset = make_rows(target, [28, 16, 22, 32], prompt=5)
    settings = {"stage": stage}
    large = gradient_of_one_step(target, tmp_path, dataset, tokens_per_batch=4 * 32, **settings)
    for small in ({"tokens_per_batch": 32}, {"tokens_per_batch": 64}):
        steps = 128 // small["tokens_per_batch"]
        accumulated = gradient_of_one_step(
            target, tmp_path, dataset, gradient_accumulation_steps=steps, **small, **settings
        )
        # In float32 the order of a sum shows.
        assert_equal(accumulated, large, tolerance=2e-5)
    assert ("future_channel.soft_prompts" in large) == (stage != "core")


def test_several_gpus_in_one_process_are_one(target, rows, tmp_path):
    draft = make_draft(target)
    args = ConFuTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 4  # what a machine with four of them sets
    trainer = ConFuTrainer(model=draft, target_model=target, args=args, train_dataset=rows)
    assert trainer.args.n_gpu == 1


# Saving and resuming


def test_a_checkpoint_is_the_draft_alone(target, rows, tmp_path):
    trainer = make_trainer(target, tmp_path, train_dataset=rows, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert sum(len(part["state"]) for part in optimizer["parts"]) == len(list(trainer.model.parameters()))

    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "custom_generate" / "generate.py").exists()
    assert not (tmp_path / "final" / "training_args.bin").exists()  # a pickle
    with pytest.raises(ValueError, match="upload the trained draft by `confu publish`"):
        trainer.push_to_hub()
    loaded = ConFuDraftModel.from_pretrained(tmp_path / "final")
    assert_equal(loaded.state_dict(), trainer.model.state_dict())
    for field in ("draft_vocab_size", "target_hidden_state_indices", "num_soft_prompts"):
        assert getattr(loaded.config, field) == getattr(trainer.model.config, field)
    ids = torch.tensor([[3, 14, 15]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=12, assistant_model=loaded), plain)


@pytest.mark.parametrize(
    "settings, stays_off",
    [
        ({"stage": "core"}, True),
        ({"stage": "contemplation"}, False),
        ({"stage": "joint"}, False),
        ({"stage": "joint", "frozen": ["contemplate", "future"]}, True),
    ],
)
def test_a_channel_is_switched_on_where_it_is_first_taught(target, rows, tmp_path, settings, stays_off):
    draft = make_draft(target)
    draft.generation_config.confu_contemplation = 0  # as conversion and stage core leave it
    if draft.future_channel.future_residual is not None:
        torch.nn.init.zeros_(draft.future_channel.future_residual.weight)
    make_trainer(target, tmp_path, draft, train_dataset=rows, **settings)
    assert hasattr(draft.generation_config, "confu_contemplation") is stays_off


def test_special_tokens_stay_the_target_s(target, rows, tmp_path, saved_target):
    tokenizer = AutoTokenizer.from_pretrained(saved_target, pad_token="<end>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (96, 96)
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(target, tmp_path, train_dataset=rows, processing_class=tokenizer, **settings)
    trainer.train()
    saved = ConFuDraftModel.from_pretrained(tmp_path / "checkpoint-1")
    for config in (trainer.model.config, trainer.model.generation_config, saved.config, saved.generation_config):
        assert config.pad_token_id is None and config.eos_token_id is None
    assert saved.config.bos_token_id == target.config.bos_token_id


class Interruption(TrainerCallback):
    """Stops a run the hard way, right after a step."""

    def __init__(self, at: int):
        self.at = at

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "at, settings",
    [(7, {}), (5, {"stage": "contemplation"}), (3, {"gradient_accumulation_steps": 2})],
    ids=["in the second epoch", "at the end of an epoch", "of accumulated batches"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(target, rows, tmp_path, at, settings):
    settings = settings | {
        "train_dataset": rows,
        "eval_dataset": rows,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": at,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = make_trainer(target, tmp_path / "whole", **settings)
    whole.train()
    interrupted = make_trainer(target, tmp_path / "resumed", **settings, callbacks=[Interruption(at)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = make_trainer(target, tmp_path / "resumed", make_draft(target, seed=9), **settings)
    torch.manual_seed(1234)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))
    for name in ("loss", "eval_loss", "eval_tau_greedy"):
        assert logged(resumed, name) == logged(whole, name)


def test_anchors_differ_between_steps(target, rows, tmp_path):
    # Two rows in one batch: nothing else varies.
    trainer = make_trainer(
        target, tmp_path, train_dataset=rows.select([1, 5]), max_steps=4, learning_rate=0.0, ttt_steps=2
    )
    trainer.train()
    assert len(set(logged(trainer, "loss"))) == 4


def test_the_best_checkpoint_is_that_of_the_highest_tau(target, tmp_path):
    class Forget(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step > 4:
                torch.nn.init.zeros_(model.lm_head.weight)

    rows = Dataset.from_dict({"input_ids": [[5, 9, *[11] * 14]] * 4, "labels": [[-100, -100, *[11] * 14]] * 4})
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    settings |= {"learning_rate": 3e-2, "save_total_limit": 1, "load_best_model_at_end": True}
    data = {"train_dataset": rows, "eval_dataset": rows}
    trainer = make_trainer(target, tmp_path, **data, callbacks=[Forget()], **settings)
    trainer.train()
    taus = logged(trainer, "eval_tau_greedy")
    best = taus.index(max(taus)) + 1
    assert best < 6 and trainer.state.best_global_step == best
    assert_equal(trainer.model.state_dict(), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert trainer.evaluate()["eval_tau_greedy"] == max(taus)


# Evaluating


def test_evaluation_measures_and_repeats(target, rows, tmp_path):
    trainer = make_trainer(target, tmp_path, train_dataset=rows, eval_dataset=rows)
    first = trainer.evaluate()
    torch.manual_seed(99)
    second = trainer.evaluate()
    measured = {"eval_loss", "eval_accuracy_0", "eval_accuracy_2", "eval_tau_greedy", "eval_future_coverage"}
    assert measured <= first.keys()
    assert {name: first[name] for name in measured} == {name: second[name] for name in measured}
    assert 0.5 < first["eval_future_coverage"] < 1
    assert 1 <= first["eval_tau_greedy"] <= 1 + sum(first[f"eval_accuracy_{step}"] for step in range(3))
    assert measured <= trainer.state.log_history[-1].keys()
    assert "test_tau_greedy" in trainer.evaluate(metric_key_prefix="test")


def test_evaluation_weighs_rows_not_batches(target, rows, tmp_path):
    results = []
    for tokens_per_batch in (16, 64, 1024):
        trainer = make_trainer(target, tmp_path, eval_dataset=rows, stage="core", tokens_per_batch=tokens_per_batch)
        metrics = trainer.evaluate()
        results.append([metrics[name] for name in ("eval_loss", "eval_accuracy_0", "eval_tau_greedy")])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_evaluating_does_not_change_training(target, rows, tmp_path):
    trained = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows}):
        trainer = make_trainer(target, tmp_path, train_dataset=rows, max_steps=4, **evaluation)
        trainer.train()
        trained.append((weights(trainer.model), logged(trainer, "loss"), logged(trainer, "accuracy_0")))
    assert len(logged(trainer, "eval_tau_greedy")) == 4
    assert_equal(trained[0][0], trained[1][0])
    assert trained[0][1:] == trained[1][1:]


# Refusals


def test_a_dataset_that_makes_no_batches_is_refused_before_the_training(target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ConFuTrainingArguments, "world_size", 3)
    message = "2 rows of these lengths cannot be shared evenly by 3 processes"
    with pytest.raises(ValueError, match=message):
        make_trainer(target, tmp_path, train_dataset=rows, eval_dataset=rows.select([0, 1]))


@pytest.mark.parametrize("stage", ["contemplation", "joint"])
def test_contemplation_is_not_taught_where_there_are_recurrent_layers(stage, tmp_path):
    message = f"Stage {stage} contemplates at many places of a text, and Qwen3_5ForCausalLM has recurrent layers"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_tiny_target("hybrid", torch.float32), tmp_path, stage=stage)


def test_a_sharding_that_accelerate_was_told_of_is_refused(target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ConFuTrainer, "is_fsdp_enabled", True, raising=False)
    set_by_trainer = Trainer.create_accelerator_and_postprocess

    def as_launched(self):
        set_by_trainer(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_launched)
    with pytest.raises(ValueError, match="FSDP or DeepSpeed is not supported: the draft is small"):
        make_trainer(target, tmp_path, train_dataset=rows)


def test_a_dataset_given_later_is_checked_too(target, rows, tmp_path):
    trainer = make_trainer(target, tmp_path, eval_dataset=rows)
    silent = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="None of the 10 rows of `eval_dataset` holds two answer tokens in a row"):
        trainer.evaluate(silent)
    assert trainer.evaluate(concatenate_datasets([silent, rows]))["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_decay_of_steps_reaches_the_objective(target, rows, tmp_path):
    def evaluated(**options) -> dict[str, float]:
        return make_trainer(target, tmp_path, eval_dataset=rows, **options).evaluate()

    assert evaluated(ttt_decay=0.5)["eval_loss"] < 0.9 * evaluated(ttt_decay=1.0)["eval_loss"]
    # An untrained draft hardly survives its first steps, so that the later ones weigh little without a decay.
    assert evaluated()["eval_loss"] < evaluated(ttt_decay=0.8)["eval_loss"]


def test_the_router_lags_as_far_as_a_tree_is_deep(target, rows, tmp_path):
    trainer = make_trainer(target, tmp_path, ttt_steps=2, replication=0)
    labels = torch.tensor([rows[1]["labels"]])
    anchors = trainer._sampling.draw(labels, [0])
    assert (anchors.positions - anchors.routed_by).max() == 3


def test_a_compiled_draft_and_one_by_name_are_drafts(target, rows, tmp_path):
    draft = make_draft(target)
    assert make_trainer(target, tmp_path, torch.compile(draft), train_dataset=rows).model is draft
    draft.save_pretrained(tmp_path / "draft")
    named = make_trainer(target, tmp_path, str(tmp_path / "draft"), train_dataset=rows)
    assert_equal(weights(named.model), weights(draft))


def test_another_way_of_wrapping_models_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_wrap_model", lambda self, model, mode: model)
    with pytest.raises(RuntimeError, match="This version of Transformers wraps models in another way than the one"):
        make_trainer(target, tmp_path)


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    args = ConFuTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as of `torchrun` where it finds no GPUs
    with pytest.raises(ValueError, match=r"2 processes were started .* on CPUs also give `--use_cpu true`"):
        args._check_machine()


def test_a_full_disk_is_told(target, rows, tmp_path, monkeypatch):
    trainer = make_trainer(target, tmp_path, train_dataset=rows, max_steps=2, save_strategy="steps", save_steps=1)

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="enforce fail"):  # another fault
        trainer.train()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="no space for a checkpoint .*the run goes on from its last whole") as error:
        trainer.train()
    assert error.value.filename == str(tmp_path)


def train_with(**changes):
    """Refused of `ConFuTrainer`: the arguments that are not as they should be."""

    def call(target, rows, folder):
        args = ConFuTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
        arguments = {"model": make_draft(target), "target_model": target, "args": args, "train_dataset": rows}
        made = {name: make(target, rows) if callable(make) else make for name, make in changes.items()}
        ConFuTrainer(**(arguments | made))

    return call


def train_under(**options):
    """Refused of `ConFuTrainingArguments`."""
    return lambda target, rows, folder: make_trainer(target, folder, train_dataset=rows, **options)


def run_without_data(method):
    return lambda target, rows, folder: getattr(make_trainer(target, folder, max_steps=1), method)()


def with_prefixes() -> PreTrainedModel:
    return get_peft_model(make_tiny_target(dtype=torch.float32), PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize(
    "call, message",
    [
        (train_with(model=lambda t, r: make_draft(t).bfloat16()), "The draft is in torch.bfloat16; train it in float"),
        (train_with(model=lambda t, r: t), "`model` is a LlamaForCausalLM, expected a ConFuDraftModel; load one with"),
        (train_with(target_model=lambda t, r: make_tiny_target(vocab_size=98)), "`vocab_size=97`, but LlamaForCausal"),
        (train_with(target_model=lambda t, r: with_prefixes()), "has an active peft prompt-learning adapter, whose"),
        (train_with(args=lambda t, r: TrainingArguments("runs", use_cpu=True)), "`args` is a TrainingArguments; give"),
        (train_with(eval_dataset=lambda t, r: {"one": r}), "`eval_dataset` is a dict; expected a `datasets.Dataset`"),
        (train_with(compute_metrics=lambda t, r: print), "`compute_metrics` has no effect here: the loss is ConFu's"),
        (run_without_data("train"), "Give `train_dataset`; make one with `prepare_dataset`."),
        (run_without_data("evaluate"), "Give `eval_dataset`; make one with `prepare_dataset`."),
        (train_under(tokens_per_batch=0), "`tokens_per_batch` is 0; it must be at least 1."),
        (train_under(report_to="comet_ml"), "`report_to` names comet_ml, of which no package is installed (installed"),
        (train_under(report_to="comet_ml,dvclive"), "`report_to` names comet_ml, dvclive, of which no package is "),
        (train_under(stage="third"), "`stage` is 'third'; it must be one of core, contemplation, joint."),
        (train_under(ttt_decay=1.5), "`ttt_decay` is 1.5; it must be above 0 and at most 1."),
        (train_under(frozen=["head"]), "`frozen` names 'head'; the groups are core, contemplate, future."),
        (train_under(stage="core", frozen=["core"]), "Nothing is left to train: stage 'core' teaches core, and `froz"),
        (train_under(feature_cache="f"), "`feature_cache` keeps what never changes, and stage 'joint' teaches soft"),
        (train_under(gradient_checkpointing=True), "`activation_checkpointing` is not supported: the steps"),
        (train_under(per_device_train_batch_size=4), "_batch_size` has no effect here: a batch holds as many rows as"),
        (train_under(fp16=True), "`fp16` is not supported: gradients of the head are made in the forward"),
        (train_under(fsdp="full_shard"), "`fsdp` is not supported: the draft is small, and the target"),
        (train_under(push_to_hub=True), "`push_to_hub` is not supported: leave it out, and upload the trained draft"),
    ],
)
def test_what_cannot_be_trained_is_refused(target, rows, tmp_path, call, message):
    with pytest.raises(ValueError) as error:
        call(target, rows, tmp_path)
    assert message in str(error.value)


def test_float16_of_the_launcher_is_refused_too(target, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="`fp16` is not supported"):
        make_trainer(target, tmp_path)


def test_kept_features_serve_any_dataset_and_any_integers(target, rows, tmp_path, monkeypatch):
    short = rows.cast(Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")}))
    settings = {"stage": "core", "train_dataset": rows, "feature_cache": str(tmp_path / "features")}
    kept, live = make_trainer(target, tmp_path, **settings), make_trainer(target, tmp_path, stage="core")
    assert kept.evaluate(short)["eval_tau_greedy"] == live.evaluate(short)["eval_tau_greedy"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    make_trainer(target, tmp_path, **settings)  # what is written takes no more room
    with pytest.raises(ValueError, match=r"features not yet written take up to 0\.0 GB, and .* has 0\.0 GB left"):
        make_trainer(target, tmp_path, **(settings | {"feature_cache": str(tmp_path / "others")}))
