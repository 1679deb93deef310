"""GGUF files as the source of an export: one file that holds configuration, tokenizer and weights."""
