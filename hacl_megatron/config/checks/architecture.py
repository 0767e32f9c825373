"""Everything that can be wrong with a model's sizes before it is built. Each check is a ValueError of one line."""

import math

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.require import require as _require
from hacl_megatron.config.checks.sizes import LIMITS
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.console import notify
from hacl_megatron.config.families import language_family
from hacl_megatron.config.families.rotary import wrong_scaling
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.image_sharing import TOWER_SIZES
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig


def check_architecture(config: RunConfig, layout: Layout) -> None:
    """Check that the model can be built, cut as `layout` wants it, and fed as the flags say.

    Raises:
        ValueError: one line for the first mistake found.
    """
    model = config.architecture
    language, vision = model.language, model.vision
    for part, record in (("language", language), ("vision", vision), ("image", model.image)):
        for name, value in vars(record).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"the model's {part}.{name} is {value}, expected more than 0; correct it")
    _check_widths(model)
    _check_tensor_parallel(config, layout.tp)
    _check_pipeline(config.parallel, language.num_layers)
    if config.transformer.get("fp8"):
        _check_fp8_widths(model, layout.tp, config.transformer.get("fp8_recipe", "delayed"))
    language_family(language.family)  # or a ValueError for an unknown one
    connector_depth(model.projector_type)  # likewise
    _check_qformer(model)
    _check_tower(model)
    check_tiles(model)

    if language.rope_scaling is not None and (why := wrong_scaling(language.rope_scaling)):
        raise ValueError(f"the model's language.rope_scaling: {why}; correct it, or leave it out")
    aspect_ratio = config.data.image_aspect_ratio
    _require(
        model.tiles is None or aspect_ratio in ("pad", model.extra.get("image_aspect_ratio")),
        f"--image-aspect-ratio is {aspect_ratio}, but the model cuts pictures into tiles, whatever their shape",
        "leave the flag out",
    )
    length = config.data.model_max_length
    _require(
        length > model.visual_tokens,
        f"--model-max-length {length} leaves no room for text beside the {model.visual_tokens} tokens of an image",
        f"give more than {model.visual_tokens}",
    )
    if model.tiles is not None:
        _check_use_of_tiles(config, model)
    _require(
        length <= language.max_position_embeddings,
        f"--model-max-length {length} is beyond the {language.max_position_embeddings} positions of the language model",
        f"give at most {language.max_position_embeddings}",
    )
    window = language.sliding_window
    _require(
        window is None or length <= window,
        f"--model-max-length {length} is beyond the language model's sliding window of {window} tokens, which this "
        "trainer does not compute",
        f"give at most {window}",
    )


def padded_vocab_size(vocab_size: int, parallel: ParallelFlags) -> int:
    """Rows of embedding and LM head over all tensor-parallel ranks.

    The next multiple of both numbers, not of their product as in Megatron-LM: so the tables of a checkpoint keep their
    size at every tensor-parallel size that divides `make_vocab_size_divisible_by`.
    """
    multiple = math.lcm(parallel.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def _check_widths(model: ModelConfig) -> None:
    language, vision = model.language, model.vision
    for part, record in (("language model", language), ("vision tower", vision)):
        _require(
            getattr(record, "kv_channels", None) is not None or record.hidden_size % record.num_attention_heads == 0,
            f"the {part}'s hidden_size {record.hidden_size} is no multiple of its {record.num_attention_heads} heads",
            "correct the model's configuration",
        )
    _require(
        language.head_dim % 2 == 0,
        f"the language model's heads are {language.head_dim} wide",
        "rotary positions need an even width",
    )
    _require(
        language.num_attention_heads % language.num_query_groups == 0,
        f"{language.num_attention_heads} attention heads cannot share {language.num_query_groups} query groups",
        "expected a divisor",
    )
    _require(
        language.hidden_size % 4 == 0,
        f"the language model's hidden_size is {language.hidden_size}",
        "the contrastive heads are a quarter as wide: expected a multiple of 4",
    )


def _check_tower(model: ModelConfig) -> None:
    vision = model.vision
    is_hf = vision.backend == "hf"
    _require(
        is_hf == (vision.hf is not None),
        f"the vision tower's backend is {vision.backend}, but its `hf` is {'' if vision.hf is None else 'not '}empty",
        "`hf` holds the transformers configuration of the backend hf, and of it alone",
    )
    _require(
        is_hf or vision.image_size % vision.patch_size == 0,
        f"the vision tower's image_size {vision.image_size} is no multiple of its patch_size {vision.patch_size}",
        "correct the tower's configuration",
    )
    _require(
        model.image.size == vision.image_size,
        f"images are resized to {model.image.size}, but the vision tower takes {vision.image_size}",
        "make `image.size` and `vision.image_size` equal",
    )
    _require(
        model.image.resized >= model.image.size,
        f"images are resized to {model.image.resized} and cropped to {model.image.size}",
        "`image.shortest_edge` must be at least `image.size`, or left out",
    )
    _require(
        1 <= model.num_vision_layers_built <= vision.num_layers,
        f"--mm-vision-select-layer {model.vision_select_layer} is outside the {vision.num_layers} layers of the tower",
        f"expected 1..{vision.num_layers} or -{vision.num_layers}..-1",
    )
    kind = vision.kind  # or a ValueError for a tower of an unknown kind
    for ours, theirs in kind.sizes.items():
        found = getattr(vision, ours) if vision.hf is None else vision.hf.get(theirs, getattr(vision, ours))
        _require(
            found == getattr(vision, ours) or (ours == "image_size" and kind.interpolates_positions),
            f"the model's vision.hf.{theirs} is {found}, but vision.{ours} {getattr(vision, ours)}",
            "make them equal",
        )
    for ours, derive in kind.derived.items():
        try:
            found = derive(vision.hf)
        except (KeyError, TypeError):
            found = None
        _require(
            found == getattr(vision, ours),
            f"the model's vision.{ours} is {getattr(vision, ours)}, but by vision.hf {found}",
            "`hf` holds the tower's whole transformers configuration: make them equal",
        )
    _require(
        kind.registers is None or isinstance(vision.hf.get(kind.registers), int),
        f"the model's vision.hf.{kind.registers} is missing",
        "`hf` holds the tower's whole transformers configuration",
    )
    fixed = kind.fixed_select_layer
    _require(
        fixed in (None, model.vision_select_layer),
        f"--mm-vision-select-layer is {model.vision_select_layer}, but a {kind.model_type} hands on its last hidden "
        "state alone",
        f"expected {fixed}, or leave the flag out",
    )
    activations = () if is_hf else kind.megatron.activations
    _require(
        is_hf or vision.activation in activations,
        f"the vision tower's activation is {vision.activation!r}",
        f"expected {' or '.join(activations)}, or --vision-backend hf",
    )


def check_tiles(model: ModelConfig) -> None:
    """Check that the model's tower and connector can see pictures in tiles, where it has any.

    Raises:
        ValueError: one line for the first mistake found.
    """
    tiles, vision, side = model.tiles, model.vision, model.vision.image_size
    if tiles is None:
        return
    _require(
        model.qformer is None,
        "the model cuts pictures into tiles, but its connector is a Q-Former, whose query tokens have no place in a "
        "picture",
        "leave `tiles` out, or take a connector linear or mlp2x_gelu",
    )
    _require(
        vision.num_features == vision.num_patches,
        f"the model cuts pictures into tiles, but its tower hands on {vision.num_features} features of a view, of "
        f"which {vision.num_patches} are patches",
        "tiles need a tower without registers and without a class token among its features: CLIP, SigLIP or DINOv2",
    )
    largest = LIMITS["image_size"]
    _require(
        1 <= len(tiles.pinpoints) <= 1000,
        f"the model's tiles.pinpoints hold {len(tiles.pinpoints)} sizes",
        "give 1 to 1,000 of them, (height, width) each",
    )
    for height, width in tiles.pinpoints:
        _require(
            max(height, width) <= largest,
            f"the model's tiles.pinpoints hold {height} x {width} pixels",
            f"expected at most {largest:,} a side",
        )
        _require(
            min(height, width) > 0 and height % side == width % side == 0,
            f"the model's tiles.pinpoints hold {height} x {width} pixels, a grid that the tower does not divide",
            f"expected multiples of its {side} pixels",
        )
    _require(
        tiles.max_tiles is None or tiles.max_tiles >= 1,
        f"the model's tiles.max_tiles is {tiles.max_tiles}",
        "expected at least 1, or null for no pooling",
    )
    _require(
        model.image.resized == model.image.size,
        f"the model cuts pictures into tiles, but `image.shortest_edge` is {model.image.resized} for views of {side}",
        "leave it out: tiles are not cropped",
    )


def _check_use_of_tiles(config: RunConfig, model: ModelConfig) -> None:
    """Whether a run can be had on pictures in tiles, and a line where some cannot be used."""
    _require(
        config.preference.preference_loss != "mdpo",
        "--preference-loss is mdpo, which shows a crop of the image, but the model cuts pictures into tiles",
        "use dpo or phrase",
    )
    length, layout = config.data.model_max_length, model.image_layout
    rows, size = max((len(layout.rows((w, h), alone=True)), (w, h)) for h, w in model.tiles.pinpoints)
    if rows >= length:
        notify(
            f"note: a picture may take up to {rows:,} rows ({size[0]} x {size[1]} pixels), more than "
            f"--model-max-length {length} holds: such samples are left out and listed."
        )


def _check_qformer(model: ModelConfig) -> None:
    qformer, width = model.qformer, model.vision.hidden_size
    _require(
        (model.projector_type == "qformer") == (qformer is not None),
        f"--mm-projector-type is {model.projector_type}, but the checkpoint or `model:` section holds "
        f"{'no' if qformer is None else 'a'} Q-Former",
        "start from a BLIP-2 model, or use linear or mlp2x_gelu" if qformer is None else "expected qformer",
    )
    if qformer is None:
        return
    _require(
        qformer.num_query_tokens > 0,
        f"the Q-Former has {qformer.num_query_tokens} query tokens",
        "expected at least 1; correct it",
    )
    for key, expected in (
        ("hidden_size", qformer.hidden_size), ("num_hidden_layers", None), ("intermediate_size", None),
        ("num_attention_heads", None), ("cross_attention_frequency", None),
    ):  # fmt: skip
        found = qformer.hf.get(key)
        _require(
            found is not None and expected in (None, found),
            f"the model's qformer.hf.{key} is {found}" + ("" if expected is None else f", qformer.{key} {expected}"),
            "`hf` holds the Q-Former's whole transformers configuration",
        )
    takes = qformer.hf.get("encoder_hidden_size")
    _require(
        takes == width,
        f"the Q-Former takes features {takes} wide, but the vision tower's are {width}",
        "give the tower that it was trained with",
    )


def _check_tensor_parallel(config: RunConfig, tp: int) -> None:
    model, splits_tower = config.architecture, tp > 1 and config.parallel.vision_parallel == "split"
    _require(
        not (splits_tower and model.vision.backend == "hf"),
        "--vision-parallel is split, but towers of transformers are whole on every rank",
        "give share, or leave it out",
    )
    parts = [("language model", model.language, ""), ("vision tower", model.vision, ", or --vision-parallel share")]
    for part, record, instead in parts[: 1 + splits_tower]:
        for name in TOWER_SIZES:
            size = getattr(record, name, tp)
            _require(
                size % tp == 0,
                f"the {part}'s {name} {size} cannot be shared by {tp} tensor-parallel ranks",
                f"choose a --tensor-model-parallel-size that divides {size}{instead}",
            )


def _check_fp8_widths(model: ModelConfig, tp: int, recipe: str) -> None:
    """As Transformer Engine's linear layers assert it (`assert_dim_for_fp8_exec`); MXFP8 scales 32 numbers at once."""
    language, multiple = model.language, 32 if recipe == "mxfp8" else 16
    for name, width in (
        ("hidden_size", language.hidden_size),
        ("heads' width together", language.num_attention_heads * language.head_dim // tp),
        ("ffn_hidden_size", language.ffn_hidden_size // tp),
    ):
        _require(
            width % multiple == 0,
            f"the language model's {name} on a tensor-parallel rank is {width}, and FP8 products take multiples of "
            f"{multiple}",
            "leave transformer.fp8 out, or choose another --tensor-model-parallel-size",
        )


def _check_pipeline(parallel: ParallelFlags, num_layers: int) -> None:
    """As megatron-core's TransformerConfig and get_num_layers_to_build check it, but before anything is built."""
    stages = parallel.pipeline_model_parallel_size
    given = [parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers]
    given = [layers for layers in given if layers is not None]
    layers_left, stages_left = num_layers - sum(given), stages - len(given)
    if not given:
        expected = "choose a --pipeline-model-parallel-size that divides them, or set " + (
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
        )
        _require(
            num_layers % stages == 0, f"{num_layers} layers cannot be shared by {stages} pipeline stages", expected
        )
        return
    even = layers_left == 0 if stages_left == 0 else layers_left > 0 and layers_left % stages_left == 0
    _require(
        even,
        f"--decoder-first/last-pipeline-num-layers take {sum(given)} of {num_layers} layers and leave {layers_left} to "
        f"the other {stages_left} pipeline stages",
        "expected a positive multiple" if stages_left else "expected none",
    )
