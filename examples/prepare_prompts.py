"""
Build a set of prompts from public sources for a target to answer, without the questions of the evaluation sets:

    python examples/prepare_prompts.py --sources open --output prompts.jsonl           # openly licensed
    python examples/prepare_prompts.py --sources paper --output prompts.jsonl          # ShareGPT and UltraChat-200K
    python examples/prepare_prompts.py --sources mine.jsonl --evaluation questions.jsonl --output prompts.jsonl

`prompts.md` beside it says where each prompt came from, under which licence, and whom to credit.
"""

from transformers_confu.data.prompts import main


if __name__ == "__main__":
    main()
