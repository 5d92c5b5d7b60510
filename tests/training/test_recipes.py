"""The recipes of the paper's targets, on tiny random targets of just their architectures."""

import json
import os
import runpy
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from transformers_confu import ConFuConfig, ConFuDraftModel, cli
from transformers_confu.data.conversations import next_prompt
from transformers_confu.training import train
from transformers_confu.training.chunked_loss import BYTES_OF_SCORE, ChunkedLoss
from transformers_confu.training.unroll import BYTES_OF_WEIGHT, unroll


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/train.yaml"))
TARGETS = {name: yaml.safe_load((RECIPES / name / "train.yaml").read_text())["target"] for name in NAMES}
WORDS = ["<s>", "</s>", "user", "assistant", *(f"w{index}" for index in range(92))]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# What the published configurations have besides sizes: rope, tied embeddings (Llama 3.2), heads that do not divide the
# hidden size (Qwen3).
CONFIGS = {
    "llama-3.2-3b-instruct": LlamaConfig(
        **SIZES,
        num_hidden_layers=7,
        head_dim=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-3.1-8b-instruct": LlamaConfig(
        **SIZES,
        num_hidden_layers=8,
        head_dim=8,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen3-4b": Qwen3Config(
        **SIZES,
        num_hidden_layers=9,
        head_dim=12,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def write_target(folder: Path, name: str) -> None:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(folder)


def write_answers(path: Path) -> None:
    """Rows as `confu data serve-regenerate` writes them, of conversations and of single prompts."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "w") as file:
        for index in range(12):
            asked = {"id": f"c{index}", "turns": ["w1 w2 w3", "w4 w5"]} if index % 2 else {"id": index, "prompt": "w6"}
            said: list[str] = []
            while prompt := next_prompt(asked, said):
                ids = torch.randint(4, len(WORDS), (16,), generator=generator).tolist()
                said.append(" ".join(WORDS[token] for token in ids))
                answer = {"answer": said[-1], "answer_ids": [*ids, 1], "temperature": 0.0, "finished": True}
                file.write(json.dumps(prompt | answer) + "\n")


def test_a_recipe_for_each_target_of_the_paper():
    assert NAMES == sorted(CONFIGS)
    assert {name: target.split("/")[1].lower() for name, target in TARGETS.items()} == {name: name for name in NAMES}


def test_all_stages_train_a_draft_for_the_architecture(name, tmp_path):
    write_target(tmp_path / "target", name)
    write_answers(tmp_path / "answers.jsonl")
    train.main(
        [
            str(RECIPES / name / "train.yaml"),
            *("--target", str(tmp_path / "target"), "--data", str(tmp_path / "answers.jsonl")),
            *("--output_dir", str(tmp_path / "runs"), "--use_cpu", "true"),
            *("--max_steps", "2", "--tokens_per_batch", "120", "--draft_vocab_size", "48", "--eval_rows", "2"),
            *("--dataloader_num_workers", "0"),
        ]
    )
    recipe = yaml.safe_load((RECIPES / name / "train.yaml").read_text())
    assert [stage["stage"] for stage in recipe["stages"]] == ["core", "warm_up", "joint"]
    draft = ConFuDraftModel.from_pretrained(tmp_path / "runs" / "joint")
    core = ConFuDraftModel.from_pretrained(tmp_path / "runs" / "core")
    assert draft.generation_config.confu_depth == recipe["ttt_steps"]
    assert draft.config.num_soft_prompts == recipe["num_soft_prompts"]
    for part in ("layers.0.mlp.up_proj.weight", "future_channel.soft_prompts"):
        assert not torch.equal(draft.get_parameter(part), core.get_parameter(part))
    # Decoding with it is exact, on the target as it was written.
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float64)
    assert type(target.config) is type(CONFIGS[name])
    ids = torch.tensor([[0, 5, 6, 7]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(target.generate(ids, assistant_model=draft.double(), do_sample=False, max_new_tokens=12), plain)


@pytest.mark.parametrize("rotated", [False, True])
def test_memory_and_operations_follow_the_law_of_the_estimate(rotated, tmp_path):
    estimate = SimpleNamespace(**runpy.run_path(str(RECIPES / "estimate.py")))
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    LlamaConfig(**SIZES | sizes, num_hidden_layers=6, max_position_embeddings=512).save_pretrained(tmp_path)
    recipe = {"target": str(tmp_path), "draft_vocab_size": 90, "ttt_steps": 3, "rotate_soft_prompts": rotated}
    recipe["stages"] = [{"stage": stage} for stage in ("core", "warm_up", "joint")]
    models = estimate.make_models(recipe, 6)
    assert models[1].config.rotate_soft_prompts == rotated
    for stage, steps in zip(estimate.stages_of(recipe), estimate.measure_all(recipe), strict=True):
        step = estimate.measure(stage, models, 1024, 256, str(tmp_path / "run"))
        operations = estimate.Law.of(steps, "operations")(6, 1024)
        # In the estimate's short rows the ends of answers, where fewer TTT steps count, weigh more.
        assert 0.8 * step.operations < operations < 1.05 * step.operations, stage["stage"]
        memory = estimate.Law.of(steps, "memory")(6, 1024)
        memory += estimate.transient_memory(models[1].config, stage["stage"], "cpu", 1024, 256)
        assert 0.95 * step.memory < memory < 1.4 * step.memory, stage["stage"]


def test_scores_and_weights_take_as_many_bytes_as_the_estimate_says(monkeypatch):
    estimate = SimpleNamespace(**runpy.run_path(str(RECIPES / "estimate.py")))
    heads, size, width = 16, 500, 128
    config = ConFuConfig(
        **{"vocab_size": size, "hidden_size": width, "intermediate_size": width, "num_attention_heads": heads},
        **{"head_dim": 8, "num_key_value_heads": 4, "target_num_hidden_layers": 4, "num_soft_prompts": 0},
    )
    draft = ConFuDraftModel(config)

    def bytes_of_attention(rows: int, length: int) -> int:
        position_ids = torch.arange(length).expand(rows, -1)
        sees = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1)
        inputs = torch.randn(rows, length, width), torch.randn(rows, length, config.taps_size)
        memory = estimate.LiveMemory(draft)
        with memory:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                steps = unroll(draft, *inputs, position_ids, sees, position_ids, None, None, num_steps=4)
                loss = torch.stack(list(steps)).float().square().mean()
            loss.backward()
        return memory.most

    def bytes_of_scores(rows_per_chunk: int) -> int:
        monkeypatch.setattr("transformers_confu.training.chunked_loss.rows_per_chunk", lambda device: rows_per_chunk)
        hidden_states, teachers = torch.randn(1024, width, requires_grad=True), torch.arange(1024)
        probabilities, zeros = torch.randn(1024, size).softmax(dim=-1), torch.zeros(1024)
        memory = estimate.LiveMemory(draft)
        with memory, torch.autocast("cpu", dtype=torch.bfloat16):
            ChunkedLoss.apply(
                hidden_states, draft.lm_head.weight, teachers, probabilities, zeros, zeros, zeros + 1, "kl"
            )
        return memory.most

    of_weight = (bytes_of_attention(1, 512) - bytes_of_attention(2, 256)) / (heads * 512 * 256)
    assert of_weight == pytest.approx(BYTES_OF_WEIGHT, rel=0.05)
    of_score = (bytes_of_scores(1024) - bytes_of_scores(256)) / (768 * size)
    assert 0.85 * BYTES_OF_SCORE < of_score < 1.02 * BYTES_OF_SCORE


def dry_run(name: str, folder: Path, *options: str, **environment: str) -> list[list[str]]:
    result = subprocess.run(
        [RECIPES / name / "launch.sh", *options],
        cwd=folder,
        env=os.environ | {"GPUS": "8", "DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def test_the_launch_file_goes_from_prompts_to_a_measured_draft(name, tmp_path):
    commands = dry_run(name, tmp_path)
    assert [" ".join(command[:3]) for command in commands] == [
        "confu data prompts",
        f"vllm serve {TARGETS[name]}",
        "confu data serve-regenerate",
        f"touch {name}/answers.complete",
        "accelerate launch --multi_gpu",
        f"confu evaluate {'--target'}",
    ]
    served = dry_run(name, tmp_path, SERVER="http://elsewhere/v1", REPOSITORY="org/draft", SOURCES="open mine.jsonl")
    assert ["--server", "http://elsewhere/v1"] == served[1][3:5] and "vllm" not in [command[0] for command in served]
    assert served[0][3:6] == ["--sources", "open", "mine.jsonl"]
    assert served[-1] == ["confu", "publish", f"{name}/runs/joint", TARGETS[name], "org/draft"] + [
        "--card",
        f"{name}/card.yaml",
    ]

    assert dry_run(name, tmp_path, "--concurrency", "9")[2][-2:] == ["--concurrency", "9"]

    (tmp_path / name).mkdir()
    for done in ("prompts.jsonl", "answers.complete"):
        (tmp_path / name / done).touch()
    assert [command[0] for command in dry_run(name, tmp_path)] == ["accelerate", "confu"]


def test_answers_and_measurement_see_the_same_options_of_the_chat_template(name, tmp_path):
    def given(**environment: str) -> list[dict | None]:
        """To `serve-regenerate` and to `evaluate`, the two commands that render prompts."""
        option = "--chat_template_kwargs"
        rendering = [
            command
            for command in dry_run(name, tmp_path, **environment)
            if command[:2] in (["confu", "evaluate"], ["confu", "data"]) and command[2] != "prompts"
        ]
        assert len(rendering) == 2
        return [json.loads(command[command.index(option) + 1]) if option in command else None for command in rendering]

    needed = {
        "qwen3-4b": {"enable_thinking": False},
        "llama-3.2-3b-instruct": {"date_string": "26 Jul 2024"},
    }
    assert given() == [needed.get(name)] * 2
    if name not in needed:
        assert given(CHAT_TEMPLATE_KWARGS='{"mood": "good"}') == [{"mood": "good"}] * 2


def test_the_commands_of_the_launch_file_take_their_options(name, tmp_path, capsys):
    for command in dry_run(name, tmp_path, REPOSITORY="org/draft"):
        if command[0] != "confu":
            continue
        with pytest.raises(SystemExit) as end:
            cli.main([*command[1:], "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in command if option.startswith("--"))


def test_as_many_processes_train_as_there_are_gpus(name, tmp_path):
    for gpus in (1, 8):
        (command,) = [line for line in dry_run(name, tmp_path, GPUS=str(gpus)) if line[0] == "accelerate"]
        arguments = launch_command_parser().parse_args(command[2:])
        assert (arguments.num_processes, arguments.multi_gpu) == (gpus, gpus > 1)
        assert arguments.training_script == "transformers_confu.cli" and arguments.module
        assert arguments.training_script_args[2:] == [
            *("--data", f"{name}/answers.jsonl", "--output_dir", f"{name}/runs")
        ]
