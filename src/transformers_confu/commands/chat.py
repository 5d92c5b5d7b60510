"""A chat in the terminal that keeps its cache and shows what the draft does: `confu chat --help`."""

import argparse
import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..common.loading import default_device, default_draft, default_dtype, load_draft, load_target
from ..inference.checks import check_target
from ..inference.modeling_confu import ConFuDraftModel


class Chat:
    r"""
    A conversation over one cache, so that no turn is computed twice; the draft's own state travels on it.

    ```python
    >>> chat = Chat(target, tokenizer, draft)
    >>> chat.ask("What is a prime number?", max_new_tokens=128)
    >>> chat.ask("Name five of them.", max_new_tokens=128)
    ```

    Args:
        target ([`PreTrainedModel`]), draft ([`ConFuDraftModel`]).
        tokenizer ([`PreTrainedTokenizerBase`]): The target's, with a chat template.
        system (`str`, *optional*): System prompt; the template's own default without it.

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
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache = DynamicCache()
        self.ids = self._encode("")
        self.written = ""  # what the template has made of `ids`

    def ask(self, question: str, streamer: BaseStreamer | None = None, **options: Any) -> str:
        r"""
        The answer to the next turn. If it is interrupted, the turn has not taken place.

        Args:
            question (`str`): What the user says.
            streamer ([`BaseStreamer`], *optional*): Gets the ids as they come.
            options: Of `generate`, such as `max_new_tokens`.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        cache, ids = self.cache, self.ids
        if prompt.startswith(self.written):
            # Earlier turns keep the ids that the target chose: to tokenise their text again could give others, which
            # the cache does not hold. Only what the template puts after the last answer is new.
            ids = torch.cat([ids, self._encode(prompt[len(self.written) :])], dim=1)
        else:  # some templates rewrite answers once they are past, to drop their thoughts or spaces
            cache, ids = DynamicCache(), self._encode(prompt)
        sequences = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            assistant_model=self.draft,
            streamer=streamer,
            return_dict_in_generate=False,
            **options,
        )
        answer_ids = sequences[0, ids.shape[1] :]
        answer = self.tokenizer.decode(answer_ids, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.cache, self.written = cache, prompt + answer
        # The template writes the token that ends a turn itself.
        ends = self.target.generation_config.eos_token_id
        ended = answer_ids[-1].item() in (ends if isinstance(ends, list) else [ends])
        self.ids = sequences[:, :-1] if ended else sequences
        return answer

    def _encode(self, text: str) -> torch.LongTensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=self.target.device)


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


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="confu chat",
        description="Chat with a target and its draft. Answers stream; behind each stand tau and speed. " + HELP,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", default="demo", help="folder or Hub id, or 'demo' for SmolLM2-135M-Instruct")
    parser.add_argument("--draft", default=default_draft(), help="folder or Hub id of the draft made for it")
    parser.add_argument(
        "--dtype", default=default_dtype(), help="of target and draft; bfloat16 where the hardware computes in it"
    )
    parser.add_argument("--system", help="system prompt, in place of the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    arguments = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("temperature", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}.")

    device = default_device()
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    target, tokenizer = load_target(arguments.target, arguments.dtype, device)
    draft = load_draft(arguments.draft, target.dtype).to(device)
    chat = Chat(target, tokenizer, draft, arguments.system)
    converse(chat, max_new_tokens=arguments.max_new_tokens, **sampling)
