"""Models of Qwen2-VL's layout from golden files."""

from torch import Tensor

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
