"""Conversations of several turns, which the target answers turn by turn with its own answers fed back.

A conversation is a row `{"id", "turns": [str, ...]}` of the user's turns, with a `system` message if wanted. Each turn
becomes a prompt row of its own once the turns before it are answered, and so each answer a training row of its own:
the prompt is the text as the target saw it, whatever a chat template does to earlier turns.
"""

from collections.abc import Mapping, Sequence
from typing import Any


# What a prompt row hands on to the rows made of it: it says how the prompt is rendered.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")


def count_turns(row: Mapping[str, Any]) -> int:
    """Number of answers that a row of prompts asks for.

    Raises:
        ValueError: the row is neither `{"id", "prompt"}` nor `{"id", "turns"}`.
    """
    turns = row.get("turns")
    if row.get("id") is None or (row.get("prompt") is None) == (turns is None):
        raise ValueError(
            f"it has the fields {sorted(key for key, value in row.items() if value is not None)}, expected 'id' and "
            f"either 'prompt' or 'turns'."
        )
    if turns is None:
        return 1
    if isinstance(turns, str) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"'turns' is {turns!r:.80}, expected a non-empty list of the user's turns as strings.")
    return len(turns)


def next_prompt(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any] | None:
    """The prompt row of the next turn: `{"id", "prompt"}`, and `tools` and `chat_template_kwargs` if the row has them.

    Args:
        row: `{"id", "prompt"}`, which is one turn, or `{"id", "turns", "system" (optional)}`.
        answers: the target's answers to the turns so far, as text.

    Returns:
        None if all turns are answered. The id is the row's own, with `/0`, `/1`, ... behind it for `turns`.
    """
    number = len(answers)
    if number >= count_turns(row):
        return None
    prompt: dict[str, Any] = {"id": row["id"], "prompt": row.get("prompt")}
    if row.get("turns") is not None:
        messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for turn, answer in zip(row["turns"], answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": row["turns"][number]})
        prompt = {"id": f"{row['id']}/{number}", "prompt": messages}
    return prompt | {name: row[name] for name in TEMPLATE_FIELDS if row.get(name) is not None}


def is_over(answer: Mapping[str, Any]) -> bool:
    """Whether a conversation ends with this answer row: none goes on behind an answer that was cut or is empty."""
    return not answer["finished"] or not answer["answer"].strip()
