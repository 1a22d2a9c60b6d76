"""A small causal language model: the dense network that compressors of language models are tried on."""
