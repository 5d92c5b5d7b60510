"""
Estimate memory and time of a recipe from small runs on this machine, without the target's weights:

    python examples/recipes/estimate.py examples/recipes/qwen3-4b/train.yaml --gpus 8 --tokens 700e6

Single training steps are run at the target's and the draft's true widths, with 2 and 3 of the target's layers and with
two numbers of tokens. Of each, the memory that its tensors take at most until the backward pass begins, parameters
apart, and the number of floating-point operations (of matrix products and attention, by torch's counter) are counted.
Both grow linearly with layers and tokens:

    m(L, T) = constant + T * (a + b * L)

a and b come from the four runs, and are taken at the target's true number of layers. To the memory is added what these
runs do not show: the target in bf16, the draft in fp32, 12 bytes for each parameter that the stage teaches, for its
gradient and both moments of AdamW; the weights of the draft's attention, which grow with the length of rows, here
`max_length`; and the scores of the draft's head, of which an accelerator holds more rows at a time than a CPU. The sum
is what is needed at most: not all of it is alive at once. Time is operations / (GPUs * peak * utilisation), where the
utilisation is assumed. What `feature_cache` saves is left out.

    python examples/recipes/estimate.py examples/recipes/qwen3-4b/train.yaml --check 512

measures besides, on the accelerator if there is one: it trains with AdamW at the true size with batches of so many
tokens in rows of 256, and compares the memory with the estimate and the speed with that of one large matrix product.
The machine must hold all of it.
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
from transformers_confu.common.demo_target import demo_target_path
from transformers_confu.common.loading import default_device
from transformers_confu.evaluation.machine import PeakMemory, describe_machine, synchronise
from transformers_confu.publishing.hub_cards import UNTRAINED
from transformers_confu.training import ConFuTrainer, ConFuTrainingArguments
from transformers_confu.training.arguments import parameter_group
from transformers_confu.training.chunked_loss import BYTES_OF_SCORE, rows_per_chunk
from transformers_confu.training.train import DraftArguments, config_of_form, form_of_new_draft
from transformers_confu.training.unroll import BYTES_OF_WEIGHT


LAYERS = (2, 3)
TOKENS = (64, 128)
ROW = 64  # tokens of a row, the first quarter of it a prompt
ROW_OF_CHECK = 256

Size = tuple[int, int]
"""Layers, tokens."""


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
    form = config_of_form(form_of_new_draft(recipe))
    return ConFuConfig.from_target(config, **form, **({"target_hidden_state_indices": taps} if taps else {}))


def stages_of(recipe: dict) -> list[dict]:
    """The options of each run of a recipe."""
    return [recipe | entry for entry in recipe["stages"]]


def training_arguments(stage: dict, **settings) -> ConFuTrainingArguments:
    """Of a stage, as far as memory and time of a step depend on them."""
    names = ("stage", "ttt_steps", "loss", "replication", "anchors_per_sequence", "max_lag", "frozen")
    options = {name: stage[name] for name in names if name in stage}
    return ConFuTrainingArguments(
        bf16=True, save_strategy="no", report_to="none", disable_tqdm=True, **options, **settings
    )


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        return make()


def number_of(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def fixed_memory(target: PreTrainedModel, draft: ConFuDraftModel, taught: list[str]) -> int:
    """Bytes of weights, gradients and moments, where these groups of parameters are taught."""
    learning = [parameter for name, parameter in draft.named_parameters() if parameter_group(name) in taught]
    return 2 * number_of(target.parameters()) + 4 * number_of(draft.parameters()) + 12 * number_of(learning)


def transient_memory(config: ConFuConfig, stage: str, device: str, tokens: int, row: int) -> int:
    """Bytes of what short rows on a CPU do not show of a step of the draft; the warm-up has none."""
    if stage == "warm_up":
        return 0
    attention = BYTES_OF_WEIGHT * config.num_attention_heads * tokens * row
    more_rows = rows_per_chunk(torch.device(device)) - rows_per_chunk(torch.device("cpu"))
    return attention + BYTES_OF_SCORE * more_rows * config.draft_vocab_size


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
    args: ConFuTrainingArguments, models: tuple[PreTrainedModel, ConFuDraftModel], row: int
) -> ConFuTrainer:
    """For steps over rows of so many tokens."""
    target, draft = models
    ids = {"input_ids": list(range(row)), "labels": [-100] * (row // 4) + list(range(row // 4, row))}
    rows = Dataset.from_list([ids] * (args.tokens_per_batch // row * args.max_steps))
    return ConFuTrainer(model=draft, target_model=target, args=args, train_dataset=rows)


def measure(stage: dict, models: tuple[PreTrainedModel, ConFuDraftModel], tokens: int, row: int, folder: str) -> Step:
    """One step of a stage."""
    # AdamW's moments are counted by formula.
    settings = {"max_steps": 1, "output_dir": folder, "use_cpu": True, "optim": "sgd", "tokens_per_batch": tokens}
    trainer = make_trainer(training_arguments(stage, **settings), models, row)
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


def measure_all(recipe: dict) -> list[dict[Size, Step]]:
    """Steps of each stage, by size."""
    stages = stages_of(recipe)
    results: list[dict[Size, Step]] = [{} for _ in stages]
    for layers in LAYERS:
        models = make_models(recipe, layers)
        with tempfile.TemporaryDirectory() as folder:
            for stage, steps in zip(stages, results, strict=True):
                for tokens in TOKENS:
                    steps[layers, tokens] = measure(stage, models, tokens, ROW, folder)
    return results


@dataclass
class Law:
    """m(L, T) of the module's text, for one of a step's figures."""

    constant: float
    a: float
    b: float

    @classmethod
    def of(cls, steps: dict[Size, Step], name: str) -> "Law":
        (few, many), (short, long) = LAYERS, TOKENS
        slopes = {
            layers: (getattr(steps[layers, long], name) - getattr(steps[layers, short], name)) / (long - short)
            for layers in LAYERS
        }
        b = (slopes[many] - slopes[few]) / (many - few)
        return cls(getattr(steps[few, short], name) - short * slopes[few], slopes[few] - b * few, b)

    def per_token(self, layers: int) -> float:
        return self.a + self.b * layers

    def __call__(self, layers: int, tokens: int) -> float:
        return self.constant + tokens * self.per_token(layers)


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


def check(recipe: dict, stage: dict, tokens: int) -> tuple[int, float, float]:
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
        settings = {"max_steps": 3, "output_dir": folder, "use_cpu": device.type == "cpu", "tokens_per_batch": tokens}
        trainer = make_trainer(training_arguments(stage, **settings), (target.to(device), draft), ROW_OF_CHECK)
        trainer.add_callback(clock)
        trainer.train()
    return memory.read() - before, clock.times[-1] - clock.times[-2], speed


def check_alone(recipe: dict, stage: dict, tokens: int) -> tuple[int, float, float]:
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
    layers = config.num_hidden_layers
    for stage, steps in zip(stages_of(recipe), measure_all(recipe), strict=True):
        name = stage["stage"]
        print(f"\n{name}, measured: layers, tokens: GiB, operations")
        for size, step in steps.items():
            print(f"  {', '.join(map(str, size))}: {step.memory / 2**30:.3f}, {step.operations:.3e}")

        memory, operations = Law.of(steps, "memory"), Law.of(steps, "operations")
        fixed = fixed_memory(target, draft, training_arguments(stage, output_dir="unused", use_cpu=True).taught)
        tokens, row = stage["tokens_per_batch"], stage.get("max_length", DraftArguments.max_length)
        transient = transient_memory(draft.config, name, "cuda", tokens, row)
        a_token = operations.per_token(layers)
        print(
            f"{name}, estimated: {fixed / 2**30:.1f} GiB of weights and AdamW, {memory.constant / 2**30:.1f} GiB, and "
            f"a token {memory.per_token(layers) / 2**20:.2f} MiB and {a_token / 1e9:.1f} GFLOP"
        )
        needed = fixed + transient + memory(layers, tokens)
        print(
            f"  memory with {tokens} tokens in rows of {row}: {needed / 2**30:.0f} GiB a GPU, "
            f"{transient / 2**30:.1f} of them of attention and scores"
        )
        total = (
            stage["max_steps"] * tokens * stage.get("gradient_accumulation_steps", 1) * arguments.gpus
            if "max_steps" in stage
            else stage["num_train_epochs"] * arguments.tokens
        )
        hours = total * a_token / (arguments.gpus * arguments.peak * arguments.utilisation) / 3600
        print(f"  time for {total / 1e6:.0f} million tokens: {hours:.1f} hours", flush=True)
        if arguments.check:
            estimated = fixed + memory(layers, arguments.check)
            estimated += transient_memory(draft.config, name, default_device(), arguments.check, ROW_OF_CHECK)
            measured, seconds, speed = check_alone(recipe, stage, arguments.check)
            done = a_token * arguments.check / seconds
            print(
                f"{name}, checked with {arguments.check} tokens: {measured / 2**30:.2f} GiB, estimated "
                f"{estimated / 2**30:.2f} ({estimated / measured - 1:+.0%}); {seconds:.1f} s a step, "
                f"{done / speed:.0%} of the {speed / 1e9:.0f} GFLOP/s of a product",
                flush=True,
            )
    if arguments.check:
        machine = describe_machine(torch.device(default_device()))
        print(", ".join(f"{name}: {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
