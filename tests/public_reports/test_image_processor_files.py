"""Which settings of an image processor hold, where a folder has two files of them or leaves some unsaid.

transformers is who decides: pixels are compared with those of its own processor, or the folder is refused.
"""

import json
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.evaluation.image_agreement import compare_pixels
from tests.tiny import write_tiny_llava

SQUARE = {"height": 48, "width": 48}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}, "crop_size": SQUARE}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llava(tmp_path_factory.mktemp("processors") / "in", layers=1, vision_layers=2)
    (folder / "model.safetensors").unlink()
    return folder


def write(folder: Path, own: dict | None, inside: dict | None = None) -> None:
    for name, content in (("preprocessor_config.json", own), ("processor_config.json", inside)):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))


READ = {
    "size as a number": (CLIP | {"size": 48, "crop_size": 48}, None),
    "SigLIP without mean": (SIGLIP, None),
    "no size": ({key: value for key, value in CLIP.items() if key != "size"}, None),
    "no type": ({key: CLIP[key] for key in ("size", "crop_size")}, None),
    "an older file of the same": (CLIP | {"size": 48, "crop_size": 48}, {"image_processor": CLIP}),
    "not inside": (SIGLIP, {"processor_class": "LlavaProcessor"}),
}


@pytest.mark.parametrize("case", READ)
def test_pixels_are_those_of_transformers(tiny: Path, case: str) -> None:
    """Catches the tower's mean where the class has its own, and an older spelling taken for another size."""
    write(tiny, *READ[case])
    config = read_model_config(tiny)
    agreement = compare_pixels(config, tiny, aspect_ratio=data_flags(config).image_aspect_ratio)
    assert agreement.holds, str(agreement)


REFUSED = {
    "number without crop": CLIP | {"size": 48, "do_center_crop": False},
    "no size and no crop": {key: value for key, value in CLIP.items() if key != "size"} | {"do_center_crop": False},
    "no crop": {key: value for key, value in CLIP.items() if key != "crop_size"},
    "longest edge": CLIP | {"size": {"shortest_edge": 48, "longest_edge": 96}},
    "SigLIP's shorter edge": SIGLIP | {"size": {"shortest_edge": 48}},
    "SigLIP's number": SIGLIP | {"size": 48},
    "mean of words": CLIP | {"image_mean": ["a", "b", "c"]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_other_shapes_is_refused(tiny: Path, case: str) -> None:
    """Catches sizes that were assumed: transformers makes pictures of 224 pixels of these, or of no square."""
    write(tiny, REFUSED[case])
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: ") as refusal:
        read_model_config(tiny)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [{"resample": 2}, {"do_rescale": False}, {"size": SQUARE}, {"size": 40}])
def test_two_files_that_disagree_are_refused_by_name(tiny: Path, change: dict) -> None:
    """Catches a preprocessor_config.json taken for what transformers 5 reads, which is the other file."""
    inside = CLIP | {"resample": 3, "do_rescale": True}
    write(tiny, inside | change, {"image_processor": inside})
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*, but processor_config.json beside it says"):
        read_model_config(tiny)
