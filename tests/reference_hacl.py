"""HACL on transformers' `LlavaForConditionalGeneration` as the released code has it: four padded passes a step.

Written against torch and transformers alone, with nothing of this package, so that it serves as an oracle for the
trainer (`tests/training/test_reference.py`) and as the other side of the benchmark (`tests/measure/measure_step.py`):

    images              vision tower, connector
    dialogue            LLM, LM head on every row          L_G
    image + EOS         LLM                                v
    caption + EOS       LLM                                t
    hallucinated + EOS  LLM                                u

Images are encoded once a micro-batch and the features used by two passes, as in X-PLUG/mPLUG-HalOwl,
hacl/llava/model/language_model/llava_llama.py (`forward`, through LLaVA's `prepare_inputs_labels_for_multimodal`); the
vision tower runs without autograd, as in LLaVA's `CLIPVisionTower.forward`. Each pass pads its sequences on the right
to the longest. Nothing else is special-cased: a pass over text records no graph where the LLM is frozen, because no
parameter on its way is trained.

Shape legend: B sequences, L rows of the longest, N pairs, M hallucinated captions, d = hidden / 4.
"""

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

IGNORE = -100
"""Label of a row that is not trained on."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as token rows; an image stands in `dialogue` as V times the model's image token."""

    dialogue: Tensor
    """int64 [L]."""
    labels: Tensor
    """int64 [L]: the token itself where it is trained on, else `IGNORE`; not shifted."""
    pixel_values: Tensor | None = None
    """float32 [3, H, W]."""
    cropped_pixels: Tensor | None = None
    """float32 [3, H, W]: a crop of them, where `mdpo` compares."""
    image_id: Hashable = None
    """Equal for equal images."""
    caption: Tensor | None = None
    """int64: BOS and the caption, without EOS. A sample with image and caption is a pair."""
    hallucinated: list[Tensor] = field(default_factory=list)
    """Hallucinated captions, like `caption`."""
    twins: list["Twin"] = field(default_factory=list)
    """Answers that a likelihood objective compares with the dialogue's own."""

    @property
    def is_pair(self) -> bool:
        return self.pixel_values is not None and self.caption is not None


@dataclass(frozen=True, kw_only=True)
class Twin:
    """The dialogue with another answer in the place of the true one."""

    rows: Tensor
    """int64 [L'], like `Sample.dialogue`; nothing behind the last token that is compared."""
    chosen: Tensor
    """int64: positions of the tokens of the true dialogue whose likelihoods are compared."""
    rejected: Tensor
    """int64: those of this one."""


class ReferenceHacl(nn.Module):
    """LLaVA with contrastive heads; the two stages differ in what trains.

    Args:
        llava: the model, fp32, with sdpa attention.
        freeze_language_model: True in pretrain (connector, heads and temperature train), False in finetune.
        image_context: what precedes the image's EOS: `image` alone, or `prompt`, the rows before it in the dialogue.
        hallucination_negatives: `own`, `all` or `none`.
        hallucination_weight: how often a hallucinated caption counts.
        mask_duplicates: leave out negatives whose caption or image equals the pair's own.
    """

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        *,
        freeze_language_model: bool,
        image_context: Literal["image", "prompt"] = "image",
        hallucination_negatives: Literal["own", "all", "none"] = "all",
        hallucination_weight: float = 1.0,
        mask_duplicates: bool = True,
        contrastive_weight: float = 1.0,
        temperature: float = 0.07,
        preference_weight: float = 0.0,
        generation_weight: float = 1.0,
        preference_beta: float | None = None,
    ) -> None:
        super().__init__()
        # Of `dpo`: the weights as they are now, which no list of this module's parameters holds.
        self.preference_beta = preference_beta
        self.start = [] if preference_beta is None else [copy.deepcopy(llava).requires_grad_(False)]
        self.preference_weight = preference_weight
        self.generation_weight = generation_weight
        self.llava = llava
        self.image_context = image_context
        self.hallucination_negatives = hallucination_negatives
        self.hallucination_weight = hallucination_weight
        self.mask_duplicates = mask_duplicates
        self.contrastive_weight = contrastive_weight
        hidden = llava.config.text_config.hidden_size
        self.vision_projector = nn.Linear(hidden, hidden // 4)
        self.text_projector = nn.Linear(hidden, hidden // 4)
        self.temperature = nn.Parameter(torch.full([1], temperature))
        llava.requires_grad_(not freeze_language_model)
        llava.model.vision_tower.requires_grad_(False)
        llava.model.multi_modal_projector.requires_grad_(True)

    @classmethod
    def from_folder(cls, folder: Path, **options) -> "ReferenceHacl":
        """A Hugging Face folder, with `hacl_heads.safetensors` beside the weights if there is one."""
        llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        model = cls(llava, **options)
        heads = Path(folder) / "hacl_heads.safetensors"
        if heads.exists():
            found = model.load_state_dict(load_file(heads), strict=False)
            assert not found.unexpected_keys, found
        return model

    # ---------------------------------------------------------------- the four passes

    def loss_sums(self, samples: Sequence[Sample], *, num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
        """(L_G, Σ L_v, Σ L_t) of one micro-batch: its share of the mean over `num_targets`, and sums over its pairs."""
        with_image = [sample for sample in samples if sample.pixel_values is not None]
        features = dict(zip(map(id, with_image), self._encode_images(with_image), strict=True))
        generation = self._generation_loss(samples, list(features.values()), num_targets)
        pairs = [sample for sample in samples if sample.is_pair]
        if not pairs:
            return generation, generation.new_zeros(()), generation.new_zeros(())
        hallucinated = [(owner, text) for owner, pair in enumerate(pairs) for text in pair.hallucinated]
        images = self._embed_images(pairs, [features[id(pair)] for pair in pairs])
        captions = self._embed_texts([pair.caption for pair in pairs])
        wrong = self._embed_texts([text for _, text in hallucinated]) if hallucinated else captions[:0]
        return generation, *self._contrastive_sums(pairs, hallucinated, images, captions, wrong)

    def preference_loss_sum(self, samples: Sequence[Sample]) -> Tensor:
        """Σ over twins of -log σ(log-likelihood of the true answer's compared tokens - the twin's), each on its
        own and with its whole dialogue; for `dpo` β times both, over what the first weights make of them."""
        total = torch.zeros(())
        for sample in samples:
            for twin in sample.twins:
                chosen, rejected, *cropped = self._of_twin(sample, twin)
                for start in self.start:
                    then = self._at_start(start, sample, twin)
                    chosen, rejected, *cropped = (
                        self.preference_beta * (now - one)
                        for now, one in zip((chosen, rejected, *cropped), then, strict=True)
                    )
                total = total - F.logsigmoid(chosen - rejected)
                for of_crop in cropped:
                    total = total - F.logsigmoid(chosen - of_crop) - F.logsigmoid(chosen)
        return total

    def _of_twin(self, sample: Sample, twin: Twin) -> list[Tensor]:
        """Log-likelihoods of the true answer, the twin and, for `mdpo`, the true answer behind a crop."""
        features = [*self._encode_images([sample])] if sample.pixel_values is not None else []
        found = [
            self._log_likelihood(sample.dialogue, twin.chosen, features),
            self._log_likelihood(twin.rows, twin.rejected, features),
        ]
        if sample.cropped_pixels is not None:
            features = [*self._encode_images([replace(sample, pixel_values=sample.cropped_pixels)])]
            found.append(self._log_likelihood(sample.dialogue, twin.chosen, features))
        return found

    @torch.no_grad()
    def _at_start(self, start: LlavaForConditionalGeneration, sample: Sample, twin: Twin) -> list[Tensor]:
        trained, self.llava = self.llava, start
        try:
            return self._of_twin(sample, twin)
        finally:
            self.llava = trained

    def _log_likelihood(self, rows: Tensor, positions: Tensor, features: Sequence[Tensor]) -> Tensor:
        """[]: of the tokens at `positions`, each given those in front of it."""
        logits = self.llava(inputs_embeds=self._inputs(rows[None], features), use_cache=False).logits[0]
        return logits.log_softmax(-1)[positions - 1, rows[positions]].sum()

    def _encode_images(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        """The LLM's inputs [V, hidden] for each sample's image."""
        if not samples:
            return []
        with torch.no_grad():
            pixel_values = torch.stack([sample.pixel_values for sample in samples])
            tower = self.llava.model.vision_tower(pixel_values, output_hidden_states=True)
        hidden = tower.hidden_states[self.llava.config.vision_feature_layer][:, 1:]  # without the class token
        return self.llava.model.multi_modal_projector(hidden)

    def _generation_loss(self, samples: Sequence[Sample], features: Sequence[Tensor], num_targets: int) -> Tensor:
        ids, mask = self._pad([sample.dialogue for sample in samples])
        labels = nn.utils.rnn.pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
        output = self.llava(
            inputs_embeds=self._inputs(ids, features),
            attention_mask=mask,
            labels=labels,
            num_items_in_batch=num_targets,
            use_cache=False,
        )
        return output.loss

    def _embed_images(self, pairs: Sequence[Sample], features: Sequence[Tensor]) -> Tensor:
        """v: unit vectors [N, d] of the EOS behind each pair's image."""
        rows = []
        for pair in pairs:
            (positions,) = torch.nonzero(pair.dialogue == self.llava.config.image_token_id, as_tuple=True)
            if not len(positions):
                raise ValueError("the dialogue of a pair holds no image token: this implementation needs one")
            first = 0 if self.image_context == "prompt" else positions[0]
            rows.append(pair.dialogue[first : positions[-1] + 1])
        hidden = self._eos_hidden(rows, features)
        return F.normalize(self.vision_projector(hidden), dim=-1)

    def _embed_texts(self, texts: Sequence[Tensor]) -> Tensor:
        """t or u: unit vectors [len(texts), d] of the EOS behind each text."""
        return F.normalize(self.text_projector(self._eos_hidden(texts, [])), dim=-1)

    def _eos_hidden(self, rows: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Final-norm hidden states [B, hidden] at an EOS appended to each sequence."""
        eos = torch.tensor([self.llava.config.text_config.eos_token_id])
        ids, mask = self._pad([torch.cat([sequence, eos]) for sequence in rows])
        output = self.llava.model.language_model(
            inputs_embeds=self._inputs(ids, features), attention_mask=mask, use_cache=False
        )
        return output.last_hidden_state[torch.arange(len(rows)), mask.sum(1) - 1]

    def _inputs(self, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Token embeddings [B, L, hidden] with the images' features in the rows of image tokens, in order."""
        embeddings = self.llava.get_input_embeddings()(ids)
        if not features:
            return embeddings
        is_image = (ids == self.llava.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(is_image, torch.cat(list(features)))

    @staticmethod
    def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Right-padded token ids and attention mask, both int64 [B, L]."""
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    # ---------------------------------------------------------------- the contrastive losses

    def _contrastive_sums(
        self,
        pairs: Sequence[Sample],
        hallucinated: Sequence[tuple[int, Tensor]],
        images: Tensor,
        captions: Tensor,
        wrong: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Σ over pairs of L_v's and L_t's terms (arXiv 2312.06968, equations 3 to 6)."""
        is_masked = torch.zeros(len(pairs), len(pairs), dtype=torch.bool)
        is_wrong_masked = torch.zeros(len(pairs), len(hallucinated), dtype=torch.bool)
        for i, pair in enumerate(pairs):
            for k, other in enumerate(pairs):
                same = pair.image_id == other.image_id or torch.equal(pair.caption, other.caption)
                is_masked[i, k] = self.mask_duplicates and i != k and same
            for m, (owner, text) in enumerate(hallucinated):
                is_wrong_masked[i, m] = (
                    self.hallucination_negatives == "none"
                    or (self.hallucination_negatives == "own" and owner != i)
                    or (self.mask_duplicates and torch.equal(pair.caption, text))
                )
        target = torch.arange(len(pairs))
        to_captions = (images @ captions.T / self.temperature).masked_fill(is_masked, -math.inf)
        to_wrong = images @ wrong.T / self.temperature + math.log(self.hallucination_weight)
        to_wrong = to_wrong.masked_fill(is_wrong_masked, -math.inf)
        to_images = (captions @ images.T / self.temperature).masked_fill(is_masked, -math.inf)
        return (
            F.cross_entropy(torch.cat([to_captions, to_wrong], 1), target, reduction="sum"),
            F.cross_entropy(to_images, target, reduction="sum"),
        )


class ReferenceTrainer:
    """Optimiser steps over a `ReferenceHacl`: AdamW, global-norm clipping, cosine decay, the temperature's clamp."""

    def __init__(
        self,
        model: ReferenceHacl,
        *,
        lr: float,
        train_iters: int,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_grad: float = 1.0,
        clip_heads_apart: bool = False,
        warmup_fraction: float = 0.03,
        contrastive_warmup_fraction: float = 0.0,
    ) -> None:
        self.model = model
        self.contrastive_warmup = int(contrastive_warmup_fraction * train_iters)
        self.clip_grad = clip_grad
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        heads = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.startswith(("vision_projector.", "text_projector.", "temperature"))
        ]
        others = [parameter for parameter in self.parameters if not any(parameter is head for head in heads)]
        self.clipped = [others, heads] if clip_heads_apart else [self.parameters]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        warmup = int(warmup_fraction * train_iters)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return (1 + math.cos(math.pi * (step - warmup) / max(train_iters - warmup, 1))) / 2

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        model.train()

    @property
    def contrastive_weight(self) -> float:
        """Lambda in the next step: ten thousand times smaller before the first, and so many times more each step."""
        done = self.scheduler.last_epoch + 1
        if done >= self.contrastive_warmup:
            return self.model.contrastive_weight
        return self.model.contrastive_weight * 1e-4 ** (1 - done / self.contrastive_warmup)

    def step(self, micro_batches: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """One step over a global batch; contrastive negatives come from the pair's own micro-batch.

        Returns the losses under their TensorBoard tags, the gradient norm before clipping, and the temperature that the
        losses were computed with.
        """
        model = self.model
        num_targets = sum(int((s.labels[1:] != IGNORE).sum()) for batch in micro_batches for s in batch)
        num_pairs = sum(sample.is_pair for batch in micro_batches for sample in batch)
        temperature = model.temperature.item()
        num_twins = sum(len(sample.twins) for batch in micro_batches for sample in batch)
        sums = [0.0, 0.0, 0.0, 0.0]
        for samples in micro_batches:
            generation, image_to_text, text_to_image = model.loss_sums(samples, num_targets=max(num_targets, 1))
            contrastive = (image_to_text + text_to_image) / (2 * max(num_pairs, 1))
            loss = model.generation_weight * generation + self.contrastive_weight * contrastive
            if num_twins and model.preference_weight:
                preference = model.preference_loss_sum(samples) / num_twins
                loss = loss + model.preference_weight * preference
                sums[3] += preference.item()
            loss.backward()
            for index, value in enumerate((generation, image_to_text, text_to_image)):
                sums[index] += value.item()
        grad_norm = sum(nn.utils.clip_grad_norm_(part, self.clip_grad) ** 2 for part in self.clipped) ** 0.5
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        return {
            "lm loss": sums[0],
            "contrastive loss i2t": sums[1] / max(num_pairs, 1),
            "contrastive loss t2i": sums[2] / max(num_pairs, 1),
            "preference loss": sums[3],
            "grad-norm": float(grad_norm),
            "temperature": temperature,
        }
