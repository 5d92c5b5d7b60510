"""A chat in the terminal that keeps its cache and shows what the draft does: `confu chat --help`."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..common.answer_text import answer_text, end_token_ids
from ..common.loading import TargetOptions, default_draft, default_dtype, load_decoding_draft
from ..common.option_files import option
from ..inference.checks import check_target
from ..inference.modeling_confu import ConFuDraftModel
from ..inference.target import input_device


class Chat:
    r"""
    A conversation over one cache, so that no turn is computed twice; the draft's own state travels on it.

    ```python
    >>> chat = Chat(target, tokenizer, draft)
    >>> chat.ask("What is a prime number?", max_new_tokens=128)
    >>> chat.ask("Name five of them.", max_new_tokens=128)
    ```

    `tokenizer` is the target's, with a chat template, which has a default of its own for a system prompt.

    Raises:
        ValueError: the draft was not made for this target, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        draft: ConFuDraftModel,
        system: str | None = None,
    ):
        check_target(target, draft.config)
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; use the instruction-tuned version of the target.")
        self.target, self.tokenizer, self.draft = target, tokenizer, draft
        self.system = system
        # Some tokenizers give other ids to the text of a rendered conversation than to the conversation.
        sample = [{"role": "user", "content": "Hello"}]
        self.can_continue = torch.equal(self._encode(self._render(sample)), self._encode_chat(sample))
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache = DynamicCache(config=self.target.config)
        self.ids = self._encode("")  # (1, tokens) of all turns
        self.written = ""  # what the template has made of them

    def ask(self, question: str, streamer: BaseStreamer | None = None, **options: Any) -> str:
        """
        The answer to the next turn; `options` are `generate`'s, such as `max_new_tokens`. If it is interrupted, the
        turn has not taken place.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self._render(messages)
        if self.can_continue and self.written and prompt.startswith(self.written):
            # Earlier turns keep the ids that the target chose: to tokenise their text again could give others, which
            # the cache does not hold. Only what the template puts after the last answer is new.
            cache, ids = self.cache, torch.cat([self.ids, self._encode(prompt[len(self.written) :])], dim=1)
        else:  # the first turn; and some templates rewrite past answers, to drop their reasoning or spaces
            cache, ids = DynamicCache(config=self.target.config), self._encode_chat(messages)
        sequences = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            assistant_model=self.draft,
            streamer=streamer,
            return_dict_in_generate=False,
            **options,
        )
        ends = end_token_ids(self.target)
        answer_ids = sequences[0, ids.shape[1] :].tolist()
        answer = answer_text(self.tokenizer, answer_ids, ends)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.cache, self.written = cache, prompt + answer
        # The template writes the token that ends a turn itself.
        self.ids = sequences[:, :-1] if answer_ids[-1] in ends else sequences
        return answer

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _encode_chat(self, messages: list[dict[str, str]]) -> torch.LongTensor:
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"].to(input_device(self.target))

    def _encode(self, text: str) -> torch.LongTensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=input_device(self.target))


HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer."


def converse(chat: Chat, **options: Any) -> None:
    """Read questions from the terminal and stream the answers, until the user ends it."""
    streamer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            print("Forgotten.")
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command. {HELP}")
        elif line:
            started = time.perf_counter()
            try:
                chat.ask(line, streamer, **options)
            except KeyboardInterrupt:
                streamer.end()
                print("[stopped; this turn is forgotten]")
                continue
            statistics, seconds = chat.draft.last_statistics, time.perf_counter() - started
            tokens = sum(statistics.emitted) + 1
            tau = f"tau {statistics.tau:.2f}, " if statistics.rounds else ""
            print(f"[{tokens} tokens, {tau}{tokens / seconds:.1f} tokens/s]")


@dataclass(kw_only=True)
class ChatOptions(TargetOptions):
    """Options of `confu chat`."""

    target: str = option("Folder or Hub id, or 'demo' for SmolLM2-135M-Instruct.", "demo")
    draft: str = option("Folder or Hub id of the draft made for the target.", default_draft)
    dtype: str = option("Of target and draft; bfloat16 where the hardware computes in it.", default_dtype)
    system: str | None = option("System prompt, in place of the template's own.")
    max_new_tokens: int = option("Longest answer.", 512)
    temperature: float = option("0 always takes the likeliest token.", 0.0)

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("max_new_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = HfArgumentParser(
        ChatOptions,
        allow_abbrev=False,
        description="Chat with a target and its draft. Answers stream; behind each stand tau and speed. " + HELP,
    )
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    target, tokenizer = options.load(options.target, options.dtype)
    draft = load_decoding_draft(options.draft, target)
    converse(Chat(target, tokenizer, draft, options.system), max_new_tokens=options.max_new_tokens, **sampling)
