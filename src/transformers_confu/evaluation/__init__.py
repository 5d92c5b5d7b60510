"""Measuring ConFu drafts. Run `python -m transformers_confu.evaluation.command --help`."""
