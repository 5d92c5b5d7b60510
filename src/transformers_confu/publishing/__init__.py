"""Drafts on the Hub: checks, model cards, uploads."""
