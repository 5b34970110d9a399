"""Tokens a second against plain PyTorch."""
