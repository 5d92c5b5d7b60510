"""
Estimate memory and time of a recipe from small runs on this machine, without the target's weights:

    python examples/recipes/estimate.py examples/recipes/qwen3-4b/train.yaml --gpus 8 --tokens 700e6

Single training steps are run at the target's and the draft's true widths, with 2 and 3 of the target's layers and with
two numbers of tokens. Of each, the memory that its tensors take at most until the backward pass begins, parameters
apart, and the number of floating-point operations (of matrix products and attention, by torch's counter) are counted.
Both grow linearly with layers and tokens:

    m(L, T) = constant + T * (a + b * L)

a and b come from the four runs, and are taken at the target's true number of layers. To the memory of a token is added
what does not depend on it: the target in bf16, the draft in fp32 with gradients and both moments of AdamW (16 bytes a
parameter). Time is operations / (GPUs * peak * utilisation); a utilisation is measured here too, as the share of the
speed of one large matrix product of this machine, but the one of a GPU can only be assumed.

The draft's attention grows with the square of a row's length, which these short rows do not show: see the README.
"""

import argparse
import copy
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.hub_cards import UNTRAINED
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments


LAYERS = (2, 3)
TOKENS = (64, 128)
ROW = 64  # tokens of a row, the first quarter of it a prompt


@dataclass
class Step:
    """What one training step took."""

    memory: int  # bytes, at most, of tensors made in the forward pass
    operations: int
    seconds: float


def target_config(recipe: dict) -> PreTrainedConfig:
    """Of the recipe's target, as the published file has it: the file itself may be behind a licence form."""
    return copy.deepcopy(UNTRAINED[f"confu-{recipe['target'].split('/')[1].lower()}"])


def draft_config(config: PreTrainedConfig, recipe: dict, taps: list[int] | None = None) -> ConFuConfig:
    sizes = {name: recipe[name] for name in ("draft_vocab_size", "num_soft_prompts")}
    return ConFuConfig.from_target(config, **sizes, **({"target_hidden_state_indices": taps} if taps else {}))


def parameters(make) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live; views of the given modules' parameters are none."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.most = 0
        parameters = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self.known = {tensor.untyped_storage()._cdata for tensor in parameters}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def measure(
    recipe: dict, stage: str, target: torch.nn.Module, draft: ConFuDraftModel, tokens: int, folder: str
) -> Step:
    """One step of a stage."""
    row = {"input_ids": list(range(ROW)), "labels": [-100] * (ROW // 4) + list(range(ROW // 4, ROW))}
    trainer = ConFuTrainer(
        model=draft,
        target_model=target,
        args=ConFuTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=True,
            optim="sgd",  # AdamW's moments are counted by formula
            stage=stage,
            max_steps=1,
            tokens_per_batch=tokens,
            ttt_steps=recipe["ttt_steps"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row] * (tokens // ROW)),
    )
    tracker = LiveMemory(target, draft)
    forward_memory = []
    backward = trainer.accelerator.backward

    def backward_at_last(loss, **kwargs):
        forward_memory.append(tracker.most)
        backward(loss, **kwargs)

    trainer.accelerator.backward = backward_at_last
    start = time.perf_counter()
    with tracker, FlopCounterMode(display=False) as counter:
        trainer.train()
    return Step(forward_memory[0], counter.get_total_flops(), time.perf_counter() - start)


def measure_all(recipe: dict) -> dict[str, dict[tuple[int, int], Step]]:
    """Steps by stage and by (layers, tokens)."""
    results: dict[str, dict[tuple[int, int], Step]] = {entry["stage"]: {} for entry in recipe["stages"]}
    for layers in LAYERS:
        config = target_config(recipe)
        config.num_hidden_layers = layers
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[:layers]
        target = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        draft = ConFuDraftModel(draft_config(config, recipe, taps=[0, 1, layers]))
        with tempfile.TemporaryDirectory() as folder:
            for stage, steps in results.items():
                for tokens in TOKENS:
                    steps[layers, tokens] = measure(recipe, stage, target, draft, tokens, folder)
    return results


def per_token(steps: dict[tuple[int, int], Step], name: str, layers: int) -> float:
    """a + b * L of the module's formula."""
    (few, many), (short, long) = LAYERS, TOKENS
    slopes = {
        number: (getattr(steps[number, long], name) - getattr(steps[number, short], name)) / (long - short)
        for number in LAYERS
    }
    return slopes[few] + (slopes[many] - slopes[few]) / (many - few) * (layers - few)


def matmul_speed(size: int = 2048) -> float:
    """Operations per second of a large product in bf16."""
    factor = torch.ones(size, size, dtype=torch.bfloat16)
    factor @ factor
    start = time.perf_counter()
    for _ in range(3):
        factor @ factor
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="train.yaml")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989e12, help="operations per second of a GPU; an H100's in bf16")
    parser.add_argument("--utilisation", type=float, default=0.3, help="assumed share of it")
    parser.add_argument("--tokens", type=float, default=400e6, help="tokens of one pass over the data")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(Path(arguments.recipe).read_text())
    config = target_config(recipe)
    target_size = parameters(lambda: AutoModelForCausalLM.from_config(config))
    draft_size = parameters(lambda: ConFuDraftModel(draft_config(config, recipe)))
    fixed = 2 * target_size + 16 * draft_size
    print(f"target {target_size / 1e9:.2f} billion parameters, draft {draft_size / 1e6:.0f} million")
    print(f"target in bf16, draft with AdamW: {fixed / 2**30:.1f} GiB")
    speed = matmul_speed()
    for stage, steps in measure_all(recipe).items():
        print(f"\n{stage}, measured: layers, tokens: GiB, operations, seconds")
        for (layers, tokens), step in steps.items():
            print(f"  {layers}, {tokens}: {step.memory / 2**30:.3f}, {step.operations:.3e}, {step.seconds:.1f}")

        memory, operations = (per_token(steps, name, config.num_hidden_layers) for name in ("memory", "operations"))
        constant = steps[LAYERS[0], TOKENS[0]].memory - TOKENS[0] * per_token(steps, "memory", LAYERS[0])
        step = steps[LAYERS[1], TOKENS[1]]
        print(f"  utilisation here: {step.operations / step.seconds / speed:.0%} of {speed / 1e9:.0f} GFLOP/s")
        tokens = recipe["tokens_per_batch"]
        print(
            f"{stage}, estimated: {constant / 2**30:.1f} GiB, and a token {memory / 2**20:.2f} MiB and "
            f"{operations / 1e9:.1f} GFLOP"
        )
        print(f"  memory with {tokens} tokens: {(fixed + constant + memory * tokens) / 2**30:.0f} GiB a GPU")
        settings = next(entry for entry in recipe["stages"] if entry["stage"] == stage)
        total = (
            settings["max_steps"] * tokens * arguments.gpus
            if "max_steps" in settings
            else settings["num_train_epochs"] * arguments.tokens
        )
        hours = total * operations / (arguments.gpus * arguments.peak * arguments.utilisation) / 3600
        print(f"  time for {total / 1e6:.0f} million tokens: {hours:.1f} hours")


if __name__ == "__main__":
    main()
