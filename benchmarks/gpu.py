"""
What decoding costs on a GPU, in about five minutes, as one JSON object per line.

Exactness in fp32 and bf16, then speed, the cost of a round by part, and kernels and host waits of a round:

- of SmolLM2-135M-Instruct with its draft, where both are on this machine;
- of random weights in the shapes of larger models, with a draft that costs what a real one does and is right with a
  known probability. These targets count: behind token t they write t + 1, whatever rounding does, so a stub can
  propose their text, corrupted, behind the back of the real draft.

    python benchmarks/gpu.py --out gpu.jsonl
    python benchmarks/gpu.py --models tiny --seconds 60      # anywhere, to see that it runs

Against plain `generate`, over its default cache and over a static one, which Transformers compiles, and against
Transformers' own assisted loop with a chain. No package has to be installed: the code is read from `src/` beside this.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
if missing := [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]:
    sys.exit(f"Missing here: {', '.join(missing)}. Install them, for example by `pip install {' '.join(missing)}`.")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, LlamaConfig, Qwen3Config  # noqa: E402

from transformers_confu import ConFuConfig, ConFuDraftModel, confu_generation_config  # noqa: E402
from transformers_confu.inference.candidate_generator_confu import ConFuCandidateGenerator  # noqa: E402
from transformers_confu.inference.draft_tree import DraftTree  # noqa: E402


LLAMA, QWEN3 = (LlamaConfig, {"vocab_size": 128256}), (Qwen3Config, {"vocab_size": 151936})
# hidden, intermediate, layers, heads, key/value heads, head size
SHAPES = {
    "llama-3.2-3b": (LLAMA, (3072, 8192, 28, 24, 8, 128)),
    "llama-3.1-8b": (LLAMA, (4096, 14336, 32, 32, 8, 128)),
    "qwen3-4b": (QWEN3, (2560, 9728, 36, 32, 8, 128)),
    "tiny": ((LlamaConfig, {"vocab_size": 997}), (64, 128, 3, 4, 2, 16)),
}
QUESTIONS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that reverses a linked list.",
    "List five facts about the river Danube.",
)
CHAIN = 4
STOCK = f"stock chain of {CHAIN}"
PARTS = ("draft", "target", "walk", "compaction")


def counting(name: str, dtype: torch.dtype, device: str) -> tuple[Any, ConFuDraftModel, list[torch.LongTensor]]:
    """
    A target of random weights in the shapes of `name`, which writes t + 1 behind token t by a wide margin; a draft
    that costs what a real one does; a prompt.
    """
    (config_class, settings), sizes = SHAPES[name]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = config_class(
        **settings,
        **dict(zip((*names, "head_dim"), sizes, strict=True)),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for layer in target.model.layers:  # so that the residual stream stays what the embedding made it
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        target.model.embed_tokens.weight.normal_()
        target.lm_head.weight.copy_(target.model.embed_tokens.weight.roll(1, dims=0))
        draft = ConFuDraftModel(ConFuConfig.from_target(config, draft_vocab_size=min(32000, config.vocab_size)))
    return target, draft.to(dtype).eval(), [torch.arange(100, 228, device=device)[None]]


@contextlib.contextmanager
def right_with(probability: float, vocab_size: int) -> Iterator[None]:
    """
    Every draft then proposes, in trees of its own sizes, the text of a counting target; each token of the chain is
    wrong with 1 - `probability`. Its own tree is grown and thrown away, and nothing waits for the device.
    """
    own_propose, rng, shapes = ConFuCandidateGenerator.propose, random.Random(0), {}

    def propose(generator, root_tokens, rounds, max_depth, future_states, noise=None):
        own = own_propose(generator, root_tokens, rounds, max_depth, future_states, noise)
        depth = min(rounds.knobs.depth, own.size - 1)
        if depth == 0:
            return own
        if own.size not in shapes:  # a chain, and the rest beside its nodes
            parents = [0, *range(depth), *(node % depth for node in range(own.size - depth - 1))]
            parents = torch.tensor([parents], device=own.tokens.device)
            shapes[own.size] = DraftTree.from_parents(parents, parents, own.log_probs.clone().zero_())
        tree = shapes[own.size]
        right = next((step for step in range(depth) if rng.random() >= probability), depth)
        tokens = own.tokens[:, :1] + tree.depths
        wrong = (tree.depths > right) | (torch.arange(own.size, device=tokens.device) > depth)
        tokens = torch.where(wrong, tokens + 1, tokens) % vocab_size
        return DraftTree(tokens, tree.parents, tree.depths, tree.log_probs, tree.ancestors)

    with mock.patch.object(ConFuCandidateGenerator, "propose", propose):
        yield


class Bench:
    """Measures one target and draft over `prompts`, each `(1, length)`; calls with the draft go in `proposing()`."""

    def __init__(self, name, target, draft, prompts, options, record, proposing=contextlib.nullcontext):
        self.name, self.target, self.draft, self.prompts = name, target, draft, prompts
        self.options, self.record, self.proposing = options, record, proposing
        self.arms = self._arms()

    def _arms(self) -> dict[str, dict[str, Any]]:
        """Options of `generate` by name, the most wanted first."""
        static: dict[str, Any] = {"cache_implementation": "static"}
        if self.options.backend:
            mode = "reduce-overhead" if self.options.backend == "inductor" else None
            static["compile_config"] = CompileConfig(backend=self.options.backend, mode=mode)
            static["compile_config"]._compile_all_devices = self.options.device == "cpu" or None
        ours: dict[str, dict[str, Any]] = {}
        for size in self.options.sizes:
            for rows in (0, size):
                knobs = {"confu_tree_size": size, "confu_contemplation": rows}
                ours |= {f"N={size}, C={rows}": knobs, f"N={size}, C={rows}, static": knobs | static}
        first, *others = ours.items()
        return dict([("plain", {}), first, (STOCK, {}), ("plain, static", static), *others])

    def generate(self, arm: str, prompt: torch.LongTensor) -> list[int]:
        """New tokens of an arm."""
        options = self.arms[arm] | {"max_new_tokens": self.options.new_tokens, "do_sample": False}
        call: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            if arm == STOCK:
                stack.enter_context(mock.patch.object(self.target, "_get_candidate_generator", self.chain))
                options["prompt_lookup_num_tokens"] = 1  # any option that selects the assisted loop
            if not arm.startswith("plain"):
                stack.enter_context(self.proposing())
            if "N=" in arm:
                call["assistant_model"] = self.draft
            config = confu_generation_config(self.target, **options)
            text = self.target.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **call
            )
        return text[0, prompt.shape[1] :].tolist()

    def chain(self, **kwargs: Any) -> ConFuCandidateGenerator:
        """What Transformers' own loop gets its candidates from."""
        return ConFuCandidateGenerator(self.draft, self.target, depth=CHAIN)

    def seconds(self, arm: str) -> tuple[float, int]:
        """Time and tokens of an arm over all prompts."""
        synchronise()
        started = time.perf_counter()
        tokens = sum(len(self.generate(arm, prompt)) for prompt in self.prompts)
        synchronise()
        return time.perf_counter() - started, tokens

    def warm_up(self, deadline: float) -> list[str]:
        """Run every arm once, as far as there is time, as the first call compiles; the arms that ran."""
        usable, plain = [], None
        for arm in self.arms:
            if plain is not None and time.perf_counter() > deadline:
                self.record("skipped", model=self.name, arm=arm, why="out of time")
                continue
            started = time.perf_counter()
            try:
                texts = [self.generate(arm, prompt) for prompt in self.prompts]
            except Exception as error:  # one arm must not cost the others their minutes
                self.record("failed", model=self.name, arm=arm, error=f"{type(error).__name__}: {error}"[:2000])
                continue
            plain = plain or texts
            same = sum(map(list.__eq__, texts, plain))
            seconds = round(time.perf_counter() - started, 2)
            self.record("warm-up", model=self.name, arm=arm, seconds=seconds, same_texts=[same, len(texts)])
            usable.append(arm)
        return usable

    def speed(self, deadline: float) -> None:
        """Tokens per second of all arms, interleaved; and where the time of a round goes."""
        now = time.perf_counter()
        arms = self.warm_up(now + (deadline - now) / 2)
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(self.options.repeats if "plain" in arms else 0):
            if repeat == 0 or time.perf_counter() < deadline:
                for arm in arms:
                    seconds, tokens = self.seconds(arm)
                    rates[arm].append(tokens / seconds)
        for arm in arms if "plain" in arms else []:
            over = [rate / plain for rate, plain in zip(rates[arm], rates["plain"], strict=True)]
            result = {"runs": len(over), "tokens_per_second": spread(rates[arm]), "over_plain": spread(over)}
            if "N=" in arm:
                with synchronised_clock():  # each part then waits for its own work
                    self.generate(arm, self.prompts[-1])
                last = self.draft.last_statistics
                per_round = {part: getattr(last, f"{part}_seconds") / last.rounds for part in PARTS}
                result["tau"] = round(last.tau, 3)
                result["ms_per_round"] = {part: round(1000 * seconds, 3) for part, seconds in per_round.items()}
            self.record("speed", model=self.name, arm=arm, **result)
        for arm in [arm for arm in arms if "N=" in arm][: 2 * self.options.profile]:
            self.profile(arm)

    def profile(self, arm: str) -> None:
        """What reaches the device, and how often the host waits for it, per round of one call."""
        on_gpu = self.options.device == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=kinds) as profiler:
            self.generate(arm, self.prompts[0])
            synchronise()
        calls: Counter[str] = Counter()
        for event in profiler.events():
            is_kernel = event.device_type != torch.autograd.DeviceType.CPU
            calls["kernels" if is_kernel else event.name] += 1
        rounds = self.draft.last_statistics.rounds
        wanted = ("kernels", "cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize")
        self.record(
            "profile",
            model=self.name,
            arm=arm,
            per_round={name: round(calls[name] / rounds, 1) for name in (*wanted, "aten::_local_scalar_dense")},
        )


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def synchronised_clock() -> Iterator[None]:
    """`time.perf_counter` waits for the device first."""
    clock = time.perf_counter

    def waiting_clock() -> float:
        synchronise()
        return clock()

    with mock.patch.object(time, "perf_counter", waiting_clock):
        yield


def smollm2(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, ConFuDraftModel, list[torch.LongTensor]]:
    """SmolLM2-135M-Instruct, its draft and prompts."""
    if options.smollm2 is None:
        from transformers_confu.common.demo_target import demo_target_path

        options.smollm2 = str(demo_target_path())
    target = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.smollm2)
    draft = ConFuDraftModel.from_pretrained(ROOT / "hub_cards" / "confu-smollm2-135m-instruct", dtype=dtype)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    return target, draft.to(options.device).eval(), [prompt.to(options.device) for prompt in prompts]


def run(options: argparse.Namespace, record: Callable[..., None]) -> None:
    started = time.perf_counter()
    torch._dynamo.config.recompile_limit = 64  # settings share functions that are compiled
    stages = [(options.models[0], torch.float32), *((name, torch.bfloat16) for name in options.models)]
    for number, (name, dtype) in enumerate(stages):
        deadline = started + options.seconds * (number + 1) / len(stages)
        is_real = name == "smollm2"
        try:
            made = smollm2(options, dtype) if is_real else counting(name, dtype, options.device)
        except Exception as error:  # no such model here, or no memory for it
            record("missing", model=name, dtype=str(dtype), error=f"{type(error).__name__}: {error}"[:2000])
            continue
        proposing = functools.partial(right_with, options.acceptance, made[0].config.vocab_size)
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        bench = Bench(label, *made, options, record, contextlib.nullcontext if is_real else proposing)
        if number == 0:  # for exactness alone
            bench.arms = {arm: bench.arms[arm] for arm in [*bench.arms][:6]}
            bench.warm_up(deadline)
        else:
            options.profile = number == 1
            bench.speed(deadline)
        del made, bench
        gc.collect()
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that records are appended to; they are always printed")
    models = ["smollm2", *SHAPES]
    parser.add_argument("--models", nargs="+", choices=models, default=models[:-1])
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct; by default where `make demo` has it")
    parser.add_argument("--sizes", nargs="+", type=int, default=[30, 16, 60], help="nodes of trees, N")
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability of the stub's tokens to be right")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="all models share it; late arms are skipped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", help="of torch.compile, as `cudagraphs`, which compiles sooner; by default that of `generate`"
    )
    options = parser.parse_args(argv)

    def record(kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind} | fields)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record(
        "environment",
        device=torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        torch=torch.__version__,
        transformers=transformers.__version__,
        commit=commit.stdout.strip() or None,
        command=["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)],
    )
    run(options, record)


if __name__ == "__main__":
    main()
