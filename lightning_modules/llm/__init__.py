"""The LLM that reads the row: a decoder of transformers."""
