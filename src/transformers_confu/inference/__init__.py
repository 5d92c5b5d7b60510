"""The engine: what a checkpoint carries, flat in one folder, since the Hub's loader copies it so."""
