"""The contrastive heads: W_v, W_t and the learned temperature."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hacl_megatron.model.init import seeded_linear


class ContrastiveHeads(nn.Module):
    """Maps EOS hidden states to unit vectors, and holds the temperature.

    Replicated over tensor-parallel ranks; lives on the last pipeline stage. `temperature` is fp32 of shape [1] whatever
    the model's dtype: a bf16 step around 0.07 would be 0.0005.

    Args:
        same_init: W_t starts as a copy of W_v, so that the first embeddings are the hidden states' own likeness.
    """

    def __init__(
        self, hidden_size: int, projection_size: int, *, temperature: float, generator: torch.Generator,
        dtype: torch.dtype, same_init: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vision_projector = seeded_linear(hidden_size, projection_size, generator=generator, dtype=dtype)
        self.text_projector = seeded_linear(hidden_size, projection_size, generator=generator, dtype=dtype)
        if same_init:
            self.text_projector.load_state_dict(self.vision_projector.state_dict())
        self.temperature = nn.Parameter(torch.full([1], temperature, dtype=torch.float32))

    def forward(
        self, image_hidden: Tensor, caption_hidden: Tensor, hallucinated_hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states [n, hidden] of the three kinds of EOS rows -> their embeddings, and the temperature itself.

        The temperature too must come out of a call: `--overlap-param-gather` waits for a module's updated parameters
        when it is called, and would hand out last step's value otherwise.
        """
        return (
            self.embed_images(image_hidden),
            self.embed_texts(caption_hidden),
            self.embed_texts(hallucinated_hidden),
            self.temperature,
        )

    def embed_images(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, hidden] of image EOS rows -> unit vectors [n, hidden / 4], fp32."""
        return F.normalize(self.vision_projector(hidden).float(), dim=-1)

    def embed_texts(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, hidden] of caption EOS rows -> unit vectors [n, hidden / 4], fp32."""
        return F.normalize(self.text_projector(hidden).float(), dim=-1)
