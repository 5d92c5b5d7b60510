"""Commands that stand on all parts: the demo and the chat."""
