"""Overrides of a run that prints nothing."""

QUIET = [
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
    "callbacks.summary=null",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "print_config=false",
]
