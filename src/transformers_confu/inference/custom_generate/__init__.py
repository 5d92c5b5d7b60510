"""The source of `custom_generate/generate.py` in a published draft; see [`transformers_confu.publishing.publish`]."""
