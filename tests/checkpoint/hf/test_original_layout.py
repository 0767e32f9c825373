"""The original LLaVA layout -> our shards -> that layout or Hugging Face's: bitwise, wherever the tower lies."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from tests.checkpoint.hf.round_trip_files import (
    LAYOUTS,
    all_tensors,
    assert_same,
    carried_of,
    load_exactly,
    write_heads,
)
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import (
    LLAMA3_ROPE_SCALING,
    tiny_llava_config,
    write_tiny_llava,
    write_tiny_original_llava,
)


@pytest.mark.parametrize("tp_size, stages", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"projector_type": "mlp2x_gelu"},
        {"projector_type": "linear", "pickle": True, "tie": True},
        {"projector_type": "mlp3x_gelu", "select_layer": -1, "rope_scaling": LLAMA3_ROPE_SCALING},
    ],
    ids=["mlp2x", "linear-bin-tied", "mlp3x-llama3"],
)
def test_original_layout_round_trip_is_bitwise(tmp_path, options, tp_size, stages):
    source, tensors = write_tiny_original_llava(tmp_path / "in", **options)
    heads = write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    out = tmp_path / "out"
    carried = carried_of(source, config)
    export_hf(imported.provider, config, out, layout="llava", dtype=torch.float32, assets=source, carried=carried)
    assert_same(all_tensors(out), tensors)
    assert_same(load_file(out / HEADS_FILE), heads)
    assert read_model_config(out) == config
    text = "A red circle on the left."
    found, expected = (LlamaTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (out, source))
    assert found == expected
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing <= {"rope_scaling", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"}, differing


def test_original_layout_with_the_tower_in_its_own_folder(tmp_path):
    source, tensors = write_tiny_original_llava(tmp_path / "in", vision_tower_inside=False)
    config = read_model_config(source)
    inside, tensors_inside = write_tiny_original_llava(tmp_path / "inside")
    assert_same(tensors, tensors_inside)
    apart, whole = (import_everywhere(folder, read_model_config(folder)) for folder in (source, inside))
    assert_same(apart.merged, whole.merged)

    write_heads(source)
    imported = import_everywhere(source, config)
    carried = carried_of(source, config)
    named = tmp_path / "named"
    export_hf(imported.provider, config, named, layout="llava", dtype=torch.float32, carried=carried, tower="named")
    assert_same(all_tensors(named), {name: value for name, value in tensors.items() if "vision_tower" not in name})
    folder = tmp_path / "folder"
    export_hf(imported.provider, config, folder, layout="llava", dtype=torch.float32, carried=carried, tower="folder")
    again = import_everywhere(folder, read_model_config(folder))
    assert_same(again.merged, imported.merged)
    from transformers import CLIPVisionModel

    _, info = CLIPVisionModel.from_pretrained(folder / "vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_llava_projector_keeps_hf_out(tmp_path):
    source, _ = write_tiny_original_llava(tmp_path / "in", projector_type="mlp3x_gelu")
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    with pytest.raises(ValueError, match=r"mlp3x_gelu.*mlp2x_gelu only.*original layout"):
        export_hf(imported.provider, config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_from_the_original_layout_to_hf_and_back(tmp_path):
    """320 rows get <image> and <pad> behind them, up to 384; the way back cuts them off exactly."""
    source, tensors = write_tiny_original_llava(tmp_path / "in", rope_scaling=LLAMA3_ROPE_SCALING)
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2)
    carried = carried_of(source, config)
    hf = tmp_path / "hf"
    report = export_hf(imported.provider, config, hf, dtype=torch.float32, assets=source, carried=carried)
    assert report.notes == ["64 vocabulary rows added (mean of the others)"]
    model = load_exactly(hf)
    assert (model.config.text_config.vocab_size, model.config.image_token_id) == (384, 320)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        rows = next(value for key, value in all_tensors(hf).items() if key.endswith(name))
        torch.testing.assert_close(rows[320:], rows[:320].mean(dim=0).expand(64, -1), rtol=0, atol=1e-6)
    processor = AutoProcessor.from_pretrained(hf)
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (320, 321)

    # The language part equals transformers' own LLaMA with the original tensors.
    llama = LlamaForCausalLM(tiny_llava_config(vocab=320, rope_scaling=LLAMA3_ROPE_SCALING).text_config).eval()
    llama.load_state_dict(
        {name: value for name, value in tensors.items() if "mm_projector" not in name and "vision" not in name}
    )
    ids = processor.tokenizer("A red circle on the left.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :320], llama(input_ids=ids).logits)

    back_config = read_model_config(hf)
    back = import_everywhere(hf, back_config)
    out = tmp_path / "out"
    carried = carried_of(hf, back_config)
    export_hf(
        back.provider, back_config, out, layout="llava", dtype=torch.float32, assets=hf, carried=carried, tower="inside"
    )
    assert_same(all_tensors(out), tensors)
    tokenizer = LlamaTokenizer.from_pretrained(out)
    assert len(tokenizer) == 320 and tokenizer("<image>")["input_ids"] != [1, 320]
    assert read_model_config(source).language == config.language


def test_an_image_token_among_the_pieces_keeps_every_row(tmp_path):
    """Catches an export to the original layout that cuts rows of ordinary tokens behind such an id."""
    source = write_tiny_llava(tmp_path / "in", layers=1, vision_layers=2)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": 300}))
    write_heads(source)
    config = read_model_config(source)
    imported, carried, out = import_everywhere(source, config), carried_of(source, config), tmp_path / "out"
    export_hf(imported.provider, config, out, layout="llava", dtype=torch.float32, assets=source, carried=carried)
    (embedding,) = (value for name, value in all_tensors(out).items() if name.endswith("embed_tokens.weight"))
    assert len(embedding) == 331 and json.loads((out / "config.json").read_text())["vocab_size"] == 331
