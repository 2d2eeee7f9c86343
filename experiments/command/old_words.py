"""Words of the command line that have gone, and what to write instead."""

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
