"""MaskLLM: learnable N:M masks of a frozen model, with the one-shot masks it starts from."""
