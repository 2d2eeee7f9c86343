"""The LLM: a transformers decoder that reads text and visual tokens."""
