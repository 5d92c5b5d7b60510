"""Measuring ConFu drafts. Run `confu evaluate --help`."""
