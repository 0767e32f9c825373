"""Parts that transformers builds: vision towers (`config.towers`) and BLIP-2's Q-Former.

Each tensor-parallel rank has them whole, as the connector is, and runs them on its share of the images (`hacl`).
Gradients of trained ones are summed over the ranks, so the replicas stay equal (`training.optimizer.image_gradients`).

Dropout is 0 in all of them, trained or frozen (transformers' Q-Former has 0.1), and no layer is left out at random: the
masks would depend on the layout.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hacl_megatron.config.architecture import ModelConfig, QFormerConfig
from hacl_megatron.config.towers.tower import BACKBONE_KEYS
from hacl_megatron.model.init import cpu_generator, seeded_linear

HOST = torch.device("cpu")
_DROPOUT = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


class HFVisionTower(nn.Module):
    """A vision model of transformers, cut behind the layer that the connector reads."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device = HOST,
        recompute: bool = False,
    ) -> None:
        """`recompute`: backward runs each layer once more and keeps its input alone."""
        super().__init__()
        vision = model.vision
        facts = {key: value for key, value in vision.hf.items() if key not in BACKBONE_KEYS}
        facts[vision.kind.sizes["num_layers"]] = model.num_vision_layers_built
        self.model = _built(vision.kind.model_class, facts, seed=seed, dtype=dtype, device=device, recompute=recompute)
        self._drops_class_token = vision.kind.has_class_token and not vision.kind.keeps_class_token
        for name in vision.kind.unused:
            _leave_out(self.model, name)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> features [I, F, vision hidden], F = `VisionConfig.num_features`."""
        features = self.model(pixel_values.to(next(self.model.parameters()).dtype)).last_hidden_state
        return features[:, 1:] if self._drops_class_token else features


class QFormerConnector(nn.Module):
    """Query tokens that gather what all tower features say (BLIP-2), and MiniGPT-4's linear projection behind them.

    [I, F, vision hidden] -> [I, V, language hidden], V = the number of query tokens.
    """

    def __init__(
        self,
        qformer: QFormerConfig,
        language_hidden: int,
        *,
        seed: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device = HOST,
    ) -> None:
        super().__init__()
        shape = (1, qformer.num_query_tokens, qformer.hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(shape, dtype=dtype))
        with torch.no_grad():  # as salesforce/LAVIS draws them; transformers' zeros would make all queries alike
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
            self.query_tokens.copy_(drawn.normal_(std=0.02, generator=cpu_generator(seed)))
        self.qformer = _built("Blip2QFormerModel", qformer.hf, seed=seed, dtype=dtype, device=device)
        self.projection = seeded_linear(qformer.hidden_size, language_hidden, generator=generator, dtype=dtype)

    def freeze_qformer(self) -> None:
        """Leave the projection alone to be trained."""
        self.query_tokens.requires_grad_(False)
        self.qformer.requires_grad_(False)

    @property
    def qformer_is_trained(self) -> bool:
        return self.query_tokens.requires_grad

    def query_states(self, features: Tensor) -> Tensor:
        """Tower features [I, F, vision hidden] -> [I, V, Q-Former hidden]."""
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def forward(self, states: Tensor, *, from_queries: bool = False) -> Tensor:
        """Tower features, or with `from_queries` what `query_states` made of them, -> [I, V, language hidden].

        A trained Q-Former must run in here: `--overlap-param-gather` waits for updated query tokens when the module
        that holds them is called.
        """
        return self.projection(states if from_queries else self.query_states(states))


def _leave_out(module: nn.Module, name: str) -> None:
    """Take a module or a parameter out of `module`, by its dotted name, where it has one of that name."""
    *path, last = name.split(".")
    parent = module.get_submodule(".".join(path))
    if last in parent._parameters:
        parent._parameters[last] = None
    elif hasattr(parent, last):
        setattr(parent, last, nn.Identity())


def _built(
    class_name: str,
    facts: dict[str, Any],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    recompute: bool = False,
) -> nn.Module:
    """A bare transformers model with transformers' own initial values, drawn from `seed` whatever was drawn before.

    They are drawn where the model will be: a ViT-g would take a host half a minute.
    """
    model_class = getattr(transformers, class_name)
    config = model_class.config_class.from_dict(facts)
    for name in _DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators), device:
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.cuda.manual_seed(seed)
        built = model_class(config)
    if recompute and hasattr(built, "activation_checkpointing_enable"):  # the newer name of the other
        built.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif recompute:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    return getattr(built, "vision_model", built).to(dtype)  # transformers 4 wraps some towers once more
