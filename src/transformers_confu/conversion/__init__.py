"""EAGLE-3 drafts of other libraries made into ConFu drafts, and ConFu's EAGLE-3 part handed back to them."""

from .from_eagle3 import convert_eagle3
from .to_eagle3 import export_eagle3


__all__ = ["convert_eagle3", "export_eagle3"]
