"""The recipes, on tiny random targets of just their targets' architectures, and of one more family with windows."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import make_family
from transformers_confu import ConFuDraftModel, cli
from transformers_confu.inference.knobs import ConFuKnobs
from transformers_confu.training import train


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/train.yaml"))
TARGETS = {name: yaml.safe_load((RECIPES / name / "train.yaml").read_text())["target"] for name in NAMES}
WORDS = ["<s>", "</s>", "user", "assistant", *(f"w{index}" for index in range(92))]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
# What the published configurations have besides sizes: rope, tied embeddings (Llama 3.2, Qwen3), heads that do not
# divide the hidden size (Qwen3), windows, recurrent layers, what is looked up in every layer.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHARED = {"vocab_size": len(WORDS), "num_hidden_layers": 8, "bos_token_id": 0, "eos_token_id": 1}
SHARED |= {"max_position_embeddings": 40960, "initializer_range": 0.02}
FAMILIES = {
    "llama-3.2-3b-instruct": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen3-4b": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
    "gpt-oss-20b": ("GptOss", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen3.5-4b": (
        "Qwen3_5Text",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "gemma-3": ("Gemma3Text", {"sliding_window": 8}),
    "gemma-3n": (
        "Gemma3nText",
        {
            **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 4},
            **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": len(WORDS)},
            **{"hidden_size_per_layer_input": 4, "laurel_rank": 4},
        },
    ),
}
# Trained by the recipe of another one; and where the experts' product has no fp64.
RECIPE_OF, DECODED_IN = {"gemma-3": "qwen3-4b", "gemma-3n": "qwen3-4b"}, {"gpt-oss-20b": torch.float32}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def write_target(folder: Path, name: str) -> None:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    family, settings = FAMILIES[name]
    make_family(family, **SHARED | settings).bfloat16().save_pretrained(folder)


def write_answers(path: Path) -> None:
    """Rows of conversations and of single prompts, with the target's answers as ids."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "w") as file:
        for index in range(12):
            messages = [{"role": "user", "content": f"w{index} w2"}]
            if index % 2:
                messages += [{"role": "assistant", "content": "w9 w8"}, {"role": "user", "content": "w4 w5"}]
            ids = torch.randint(4, len(WORDS), (16,), generator=generator).tolist()
            file.write(json.dumps({"prompt": messages, "answer_ids": [*ids, 1]}) + "\n")


def stages_of(name: str) -> list[str]:
    return [stage["stage"] for stage in yaml.safe_load((RECIPES / name / "train.yaml").read_text())["stages"]]


def test_a_recipe_for_each_target():
    assert NAMES == ["gpt-oss-20b", "llama-3.1-8b-instruct", "llama-3.2-3b-instruct", "qwen3-4b", "qwen3.5-4b"]
    assert [stages_of(name) for name in NAMES] == [["core", "contemplation", "joint"]] * 4 + [["core"]]
    assert {name: target.split("/")[1].lower() for name, target in TARGETS.items()} == {name: name for name in NAMES}


def test_the_training_files_of_the_small_target_name_options_that_exist(tmp_path, monkeypatch):
    """`train_smollm2/`: the files are parsed as the command does, and nothing is run."""
    monkeypatch.setattr(train, "run", lambda folder, arguments, training: stages.append(training.stage))
    stages: list[str] = []
    for file in sorted((RECIPES.parent / "train_smollm2").glob("*.yaml")):
        train.main([str(file), "--output_dir", str(tmp_path / file.stem), "--use_cpu", "true"])
    assert stages == ["core", "core", "contemplation", "joint", "core"]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_stages_train_a_draft_for_the_architecture(name, tmp_path):
    write_target(tmp_path / "target", name)
    write_answers(tmp_path / "answers.jsonl")
    recipe = RECIPES / RECIPE_OF.get(name, name) / "train.yaml"
    train.main(
        [
            str(recipe),
            *("--target", str(tmp_path / "target"), "--data", str(tmp_path / "answers.jsonl")),
            *("--output_dir", str(tmp_path / "runs"), "--use_cpu", "true"),
            *("--max_steps", "2", "--tokens_per_batch", "120", "--draft_vocab_size", "48", "--held_out_share", "0.3"),
            *("--dataloader_num_workers", "0"),
        ]
    )
    core = draft = ConFuDraftModel.from_pretrained(tmp_path / "runs" / "core")
    if (last := stages_of(recipe.parent.name)[-1]) != "core":
        draft = ConFuDraftModel.from_pretrained(tmp_path / "runs" / last)
        assert draft.config.rotate_soft_prompts and draft.config.num_soft_prompts == 16
        for part in ("layers.0.mlp.up_proj.weight", "future_channel.soft_prompts"):
            assert not torch.equal(draft.get_parameter(part), core.get_parameter(part))
    # Rounds stay automatic, and contemplate where the channel is trained.
    assert ConFuKnobs.of(draft.generation_config) == ({"confu_contemplation": 0} if last == "core" else {})
    # Decoding with it is exact, on the target as it was written.
    dtype = DECODED_IN.get(name, torch.float64)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=dtype)
    ids = torch.tensor([[0, 5, 6, 7]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(
        target.generate(ids, assistant_model=draft.to(dtype), do_sample=False, max_new_tokens=12), plain
    )


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


CHAT_TEMPLATE_KWARGS = {
    "gpt-oss-20b": {"reasoning_effort": "low"},
    "qwen3-4b": {"enable_thinking": False},
    "qwen3.5-4b": {"enable_thinking": False},
    "llama-3.2-3b-instruct": {"date_string": "26 Jul 2024"},
}


def test_the_launch_file_goes_from_prompts_to_a_published_draft(name, tmp_path, capsys):
    commands = dry_run(name, tmp_path, REPOSITORY="org/draft")
    assert [" ".join(command[:3]) for command in commands] == [
        "confu data prompts",
        f"vllm serve {TARGETS[name]}",
        "confu data serve-regenerate",
        f"touch {name}/answers.complete",
        "accelerate launch --multi_gpu",
        "confu evaluate --target",
        f"confu publish {name}/runs/{stages_of(name)[-1]}",
    ]
    assert (f"confu={name}/runs/joint" in commands[5]) == (stages_of(name)[-1] == "joint")
    assert f"core={name}/runs/core" in commands[5]
    assert ("--baselines plain --chat" in " ".join(commands[5])) == (name == "qwen3.5-4b")
    for command in (command for command in commands if command[0] == "confu"):
        with pytest.raises(SystemExit) as end:
            cli.main([*command[1:], "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in command if option.startswith("--"))
    # Answers and measurement render prompts alike.
    option = "--chat_template_kwargs"
    for command in (commands[2], commands[5]):
        given = json.loads(command[command.index(option) + 1]) if option in command else None
        assert given == CHAT_TEMPLATE_KWARGS.get(name)


def test_the_launch_file_takes_settings_and_skips_what_is_done(tmp_path):
    name = "qwen3-4b"
    served = dry_run(name, tmp_path, "--concurrency", "9", SERVER="http://elsewhere/v1", SOURCES="open mine.jsonl")
    assert served[0][3:6] == ["--sources", "open", "mine.jsonl"]
    assert served[1][3:5] == ["--server", "http://elsewhere/v1"] and served[1][-2:] == ["--concurrency", "9"]
    (tmp_path / name).mkdir()
    for done in ("prompts.jsonl", "answers.complete"):
        (tmp_path / name / done).touch()
    assert [command[0] for command in dry_run(name, tmp_path)] == ["accelerate", "confu"]
    (command, _) = dry_run(name, tmp_path, GPUS="1")
    arguments = launch_command_parser().parse_args(command[2:])
    assert (arguments.num_processes, arguments.multi_gpu, arguments.module) == (1, False, True)
    assert arguments.training_script_args[2:] == ["--data", f"{name}/answers.jsonl", "--output_dir", f"{name}/runs"]
