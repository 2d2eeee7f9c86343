"""Models and batches of Qwen2-VL's layout from golden files."""

import torch
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch, Visual, visual_fields
from lightning_modules.importers.match import Allowed, check, copy, match
from lightning_modules.importers.qwen2_vl import Qwen2VLImporter
from lightning_modules.model import VideoLanguageModel

WORDS = {
    "vanilla_rope": "vanilla",
    "tad_rope": "tad",
    "m_rope": "mrope",
    "videorope": "videorope",
}


def published_config(golden, name):
    """Returns the config.json of a golden model, as transformers 4.45 writes it."""
    sizes = dict(golden.spec["models"][name])
    sections = sizes.pop("mrope_section")
    rope = {"type": "mrope", "mrope_section": sections}
    return sizes | {"model_type": "qwen2_vl", "rope_scaling": rope}


def published_weights(golden, name) -> dict[str, Tensor]:
    prefix = f"weights/{name}/"
    return {
        key.removeprefix(prefix): value.float()
        for key, value in golden.tensors.items()
        if key.startswith(prefix)
    }


def model_of(golden, name, scheme) -> VideoLanguageModel:
    """Returns the golden model `name` under a scheme, with every published tensor in its place."""
    importer = Qwen2VLImporter(published_config(golden, name), rotary=WORDS[scheme])
    model = importer.build()
    found = match(published_weights(golden, name), model, importer.rules)
    check(found, Allowed(), name)
    copy(model, found.values)
    return model.eval()


def visual_of(golden, name):
    return Visual(golden.tensors[f"visuals/{name}/resized"])


def batch_of(golden, number):
    """Returns the batch of a case: the published ids, with one slot for the tokens of a visual."""
    case = golden.spec["cases"][number]
    sizes = golden.spec["models"][case["model"]]
    special = {sizes["image_token_id"], sizes["video_token_id"]}
    rows, visuals = [], []
    ids, masks = (golden.tensors[f"case{number}/{n}"] for n in ("input_ids", "attention_mask"))
    for row, own, mask in zip(case["rows"], ids, masks, strict=True):
        left, kept = iter(own[mask.bool()].tolist()), []
        for kind, *n in row["segments"]:
            size = n[0] if kind == "text" else torch.tensor(n).prod().item()
            part = [next(left) for _ in range(size)]
            assert kind == "text" or set(part) <= special
            kept += part if kind == "text" else [VISUAL_SLOT]
        assert not list(left)
        rows.append(torch.tensor(kept))
        visuals += [visual_of(golden, name) for name in row["visuals"]]
    pad = torch.nn.utils.rnn.pad_sequence
    none = torch.zeros(len(rows), 1, dtype=torch.long)
    padded = pad(rows, batch_first=True)
    return VideoBatch(
        padded,
        pad([torch.ones_like(row).bool() for row in rows], batch_first=True),
        torch.full_like(padded, IGNORE_INDEX),
        **visual_fields(visuals),
        prompt_ids=none,
        prompt_mask=none.bool(),
        keys=[str(number)] * len(rows),
    )
