"""
Estimate memory and time of a recipe from small runs on this machine, without the target's weights:

    python examples/recipes/estimate.py examples/recipes/qwen3-4b/train.yaml --gpus 8 --tokens 700e6

Single training steps are run at the target's and the draft's true widths, with 2 and 3 of the target's layers and with
two numbers of tokens. Of each, the memory that its tensors take at most until the backward pass begins, parameters
apart, and the number of floating-point operations (of matrix products and attention, by torch's counter) are counted.
Both grow linearly with layers and tokens:

    m(L, T) = constant + T * (a + b * L)

a and b come from the four runs, and are taken at the target's true number of layers. To the memory of a token is added
what does not depend on it: the target in bf16, the draft in fp32, and 12 bytes for each parameter that the stage
teaches, for its gradient and both moments of AdamW. Time is operations / (GPUs * peak * utilisation), where the
utilisation is assumed.

The draft's attention grows with the square of a row's length, which these short rows do not show: see the README.

    python examples/recipes/estimate.py examples/recipes/qwen3-4b/train.yaml --check 512

measures besides, on the accelerator if there is one: it trains with AdamW at the true size with batches of so many
tokens, and compares the memory with the estimate and the speed with that of one large matrix product. The machine must
hold all of it.
"""

import argparse
import copy
import multiprocessing
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.initialization import no_init_weights

from transformers_confu import ConFuConfig, ConFuDraftModel
from transformers_confu.demo_target import demo_target_path
from transformers_confu.evaluation.machine import PeakMemory, describe_machine, synchronise
from transformers_confu.hub_cards import UNTRAINED
from transformers_confu.loading import default_device
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.arguments import TAUGHT_BY_STAGE, parameter_group
from transformers_confu.training.train import DraftArguments


LAYERS = (2, 3)
TOKENS = (64, 128)
ROW = 64  # tokens of a row, the first quarter of it a prompt
ROW_OF_CHECK = 256


@dataclass
class Step:
    """What one training step took."""

    memory: int  # bytes, at most, of tensors made in the forward pass
    operations: int


def target_config(recipe: dict) -> PreTrainedConfig:
    """Of the recipe's target; of the paper's as published, since the files themselves are behind a licence form."""
    name = recipe["target"]
    published = UNTRAINED.get(f"confu-{name.split('/')[-1].lower()}")
    return copy.deepcopy(published) or AutoConfig.from_pretrained(demo_target_path() if name == "demo" else name)


def draft_config(config: PreTrainedConfig, recipe: dict, taps: list[int] | None = None) -> ConFuConfig:
    sizes = {
        name: recipe.get(name, getattr(DraftArguments, name)) for name in ("draft_vocab_size", "num_soft_prompts")
    }
    return ConFuConfig.from_target(config, **sizes, **({"target_hidden_state_indices": taps} if taps else {}))


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        return make()


def number_of(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def fixed_memory(target: PreTrainedModel, draft: ConFuDraftModel, stage: str) -> int:
    """Bytes of weights, gradients and moments."""
    taught = [
        parameter for name, parameter in draft.named_parameters() if parameter_group(name) in TAUGHT_BY_STAGE[stage]
    ]
    return 2 * number_of(target.parameters()) + 4 * number_of(draft.parameters()) + 12 * number_of(taught)


def make_models(recipe: dict, layers: int | None = None) -> tuple[PreTrainedModel, ConFuDraftModel]:
    """Target, with its first layers or all, and draft. Their weights are 0: drawing them takes longer than steps."""
    config = target_config(recipe)
    taps = None
    if layers is not None:
        taps = [0, 1, layers]
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with no_init_weights():
        target = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return target, ConFuDraftModel(draft_config(config, recipe, taps))


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


def make_trainer(
    recipe: dict, stage: str, models: tuple[PreTrainedModel, ConFuDraftModel], row: int, tokens: int, **settings
) -> ConFuTrainer:
    """For steps of a stage over `tokens` tokens, in rows of `row`."""
    target, draft = models
    steps = settings["max_steps"]
    ids = {"input_ids": list(range(row)), "labels": [-100] * (row // 4) + list(range(row // 4, row))}
    return ConFuTrainer(
        model=draft,
        target_model=target,
        args=ConFuTrainingArguments(
            bf16=True,
            stage=stage,
            tokens_per_batch=tokens,
            ttt_steps=recipe["ttt_steps"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list([ids] * (tokens // row * steps)),
    )


def measure(
    recipe: dict, stage: str, models: tuple[PreTrainedModel, ConFuDraftModel], tokens: int, folder: str
) -> Step:
    """One step of a stage."""
    # AdamW's moments are counted by formula.
    trainer = make_trainer(
        recipe, stage, models, ROW, tokens, max_steps=1, output_dir=folder, use_cpu=True, optim="sgd"
    )
    tracker = LiveMemory(*models)
    forward_memory = []
    backward = trainer.accelerator.backward

    def backward_at_last(loss, **kwargs):
        forward_memory.append(tracker.most)
        backward(loss, **kwargs)

    trainer.accelerator.backward = backward_at_last
    with tracker, FlopCounterMode(display=False) as counter:
        trainer.train()
    return Step(forward_memory[0], counter.get_total_flops())


def measure_all(recipe: dict) -> dict[str, dict[tuple[int, int], Step]]:
    """Steps by stage and by (layers, tokens)."""
    results: dict[str, dict[tuple[int, int], Step]] = {entry["stage"]: {} for entry in recipe["stages"]}
    for layers in LAYERS:
        models = make_models(recipe, layers)
        with tempfile.TemporaryDirectory() as folder:
            for stage, steps in results.items():
                for tokens in TOKENS:
                    steps[layers, tokens] = measure(recipe, stage, models, tokens, folder)
    return results


def per_token(steps: dict[tuple[int, int], Step], name: str, layers: int) -> float:
    """a + b * L of the module's formula."""
    (few, many), (short, long) = LAYERS, TOKENS
    slopes = {
        number: (getattr(steps[number, long], name) - getattr(steps[number, short], name)) / (long - short)
        for number in LAYERS
    }
    return slopes[few] + (slopes[many] - slopes[few]) / (many - few) * (layers - few)


def matmul_speed(device: torch.device, size: int = 4096) -> float:
    """Operations per second of a large product in bf16."""
    factor = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    factor @ factor
    synchronise(device)
    start = time.perf_counter()
    for _ in range(3):
        factor @ factor
    synchronise(device)
    return 3 * 2 * size**3 / (time.perf_counter() - start)


class Clock(TrainerCallback):
    """The time at the end of every step, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronise(args.device)
        self.times.append(time.perf_counter())


def check(recipe: dict, stage: str, tokens: int) -> tuple[int, float, float]:
    """At the true size, in a process of its own: bytes at most, seconds of a step, speed of a product here."""
    device = torch.device(default_device())
    speed = matmul_speed(device)
    memory = PeakMemory(device)
    before = 0 if device.type == "cuda" else memory.read()  # of a process without models
    memory.reset()
    target, draft = make_models(recipe)
    with torch.no_grad():
        for parameter in (*target.parameters(), *draft.parameters()):
            parameter.uniform_(-0.02, 0.02)  # the system gives room only to what is written
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        models = target.to(device), draft
        settings = {"max_steps": 3, "output_dir": folder, "use_cpu": device.type == "cpu"}
        trainer = make_trainer(recipe, stage, models, ROW_OF_CHECK, tokens, **settings)
        trainer.add_callback(clock)
        trainer.train()
    return memory.read() - before, clock.times[-1] - clock.times[-2], speed


def check_alone(recipe: dict, stage: str, tokens: int) -> tuple[int, float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(check, recipe, stage, tokens).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="train.yaml")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989e12, help="operations per second of a GPU; an H100's in bf16")
    parser.add_argument("--utilisation", type=float, default=0.3, help="assumed share of it")
    parser.add_argument("--tokens", type=float, default=400e6, help="tokens of one pass over the data")
    parser.add_argument("--check", type=int, metavar="TOKENS", help="measure steps of so many tokens at the true size")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(Path(arguments.recipe).read_text())
    config = target_config(recipe)
    target = on_meta(lambda: AutoModelForCausalLM.from_config(config))
    draft = on_meta(lambda: ConFuDraftModel(draft_config(config, recipe)))
    sizes = number_of(target.parameters()), number_of(draft.parameters())
    print(f"target {sizes[0] / 1e9:.2f} billion parameters, draft {sizes[1] / 1e6:.0f} million")
    for stage, steps in measure_all(recipe).items():
        print(f"\n{stage}, measured: layers, tokens: GiB, operations")
        for (layers, tokens), step in steps.items():
            print(f"  {layers}, {tokens}: {step.memory / 2**30:.3f}, {step.operations:.3e}")

        memory, operations = (per_token(steps, name, config.num_hidden_layers) for name in ("memory", "operations"))
        constant = steps[LAYERS[0], TOKENS[0]].memory - TOKENS[0] * per_token(steps, "memory", LAYERS[0])
        fixed = fixed_memory(target, draft, stage)
        tokens = recipe["tokens_per_batch"]
        print(
            f"{stage}, estimated: {fixed / 2**30:.1f} GiB of weights and AdamW, {constant / 2**30:.1f} GiB, and a "
            f"token {memory / 2**20:.2f} MiB and {operations / 1e9:.1f} GFLOP"
        )
        print(f"  memory with {tokens} tokens: {(fixed + constant + memory * tokens) / 2**30:.0f} GiB a GPU")
        settings = next(entry for entry in recipe["stages"] if entry["stage"] == stage)
        total = (
            settings["max_steps"] * tokens * arguments.gpus
            if "max_steps" in settings
            else settings["num_train_epochs"] * arguments.tokens
        )
        hours = total * operations / (arguments.gpus * arguments.peak * arguments.utilisation) / 3600
        print(f"  time for {total / 1e6:.0f} million tokens: {hours:.1f} hours", flush=True)
        if arguments.check:
            estimated = fixed + constant + memory * arguments.check
            measured, seconds, speed = check_alone(recipe, stage, arguments.check)
            print(
                f"{stage}, checked with {arguments.check} tokens: {measured / 2**30:.2f} GiB, estimated "
                f"{estimated / 2**30:.2f} ({estimated / measured - 1:+.0%}); {seconds:.1f} s a step, "
                f"{operations * arguments.check / seconds / speed:.0%} of the {speed / 1e9:.0f} GFLOP/s of a product",
                flush=True,
            )
    if arguments.check:
        machine = describe_machine(torch.device(default_device()))
        print(", ".join(f"{name}: {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
