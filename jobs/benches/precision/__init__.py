"""FP8 against BF16."""
