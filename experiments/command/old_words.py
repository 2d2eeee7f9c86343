"""Words of older command lines: those that have gone, and those that still work."""

from collections.abc import Iterable

_PPLLAVA = "ppllava_vicuna7b"
_VIDEOROPE = "videorope_qwen2_7b"

#: New words by old word.
NEW_WORDS = {
    "data=preference_tiny": "data=tiny",
    "experiment=clip_context_tiny": "experiment=clip_context scale=tiny",
    f"experiment={_VIDEOROPE}_tiny": f"experiment={_VIDEOROPE} scale=tiny",
    "experiment=ppllava_dpo_tiny": "experiment=ppllava_dpo scale=tiny",
    **{
        f"experiment={_PPLLAVA}_{data}_tiny": f"experiment={_PPLLAVA}_{data} scale=tiny"
        for data in ("video", "image_video", "multi_image")
    },
    **{
        f"experiment={_VIDEOROPE}_{rotary}{end}": f"experiment={_VIDEOROPE}{scale} rotary={rotary}"
        for rotary in ("vanilla", "tad", "mrope", "videorope")
        for end, scale in (("", ""), ("_tiny", " scale=tiny"))
    },
}

#: Keys of the trainer that older configs do not have, with Lightning's defaults. A missing key has
#: the same effect.
NEW_KEYS = {
    "trainer.check_val_every_n_epoch": 1,
    "trainer.detect_anomaly": False,
    "trainer.enable_model_summary": False,
    "trainer.fast_dev_run": False,
    "trainer.max_steps": -1,
    "trainer.num_nodes": 1,
    "trainer.overfit_batches": 0,
    "trainer.strategy": "auto",
}


def without_plus(words: Iterable[str]) -> list[str]:
    """Returns the words without the `+` of keys that older command lines had to add.

    Hydra refuses to add a key that exists and is not null.
    """
    plus = {f"+{key}" for key in NEW_KEYS}
    return [word[1:] if word.partition("=")[0] in plus else word for word in words]
