"""Encoders that read each visual at its own size: towers of the Qwen-VL family."""
