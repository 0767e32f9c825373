"""Answers of an exported LLaVA or MiniGPT-4 to questions about images, in batches, by transformers' `generate`.

    Question(image, prompt) ─training's own template→ rows [L], IMAGE x its rows ──┐
                 └─FolderStore→ bytes ─ImageDecoder→ pixels of views [n, 3, S, S] ─┴→ left-padded batch ─generate→ text

Prompts are encoded by the very code that encodes training dialogues (`hacl_megatron.data.encoding`), since
transformers' LlavaProcessor reads the text behind `<image>` differently: LLaVA tokenizes it on its own, with
SentencePiece's dummy space, the processor does not. Pixels come from the trainer's own steps, too, by Pillow.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.data.encoding import IMAGE, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import IMAGE_TAG, Sample
from hacl_megatron.data.store import FolderStore
from hacl_megatron.data.templates import find_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.image_files import read_images
from hacl_megatron.evaluation.model_files import choose_device, default_dtype

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class NotFinite(ValueError):
    """A model's logits are NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A message to the model about one image."""

    image: str
    """File name relative to the image folder."""
    prompt: str
    """The user's text, without the image tag."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question."""

    text: str
    """The model's answer without surrounding blanks; empty where there is an error."""
    error: str | None
    """Why the question could not be put, in one line."""
    cut: str | None = None
    """Why the answer ends before the model had ended it, in one line, where that is not `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are made."""

    max_new_tokens: int
    num_beams: int = 1
    """1: greedy. Never sampled."""
    batch_size: int = 8


class Answerer:
    """An exported model with its tokenizer and image processing.

    Args:
        folder: `LlavaForConditionalGeneration`, or `Blip2ForConditionalGeneration` with a LLaMA, with tokenizer and
            processor (tools/convert_megatron_to_hf.py).
        images: the folder of the questions' images.
        dtype: default bfloat16 on a GPU, float32 on the CPU.

    Raises:
        ValueError: no such model, a part of it missing, no image folder, no GPU where one is asked for.
    """

    def __init__(
        self,
        folder: Path,
        images: Path,
        *,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    ) -> None:
        self.folder, self.config = folder, read_export(folder)
        self.device = choose_device(device)
        self.dtype = DTYPES[dtype or default_dtype(self.device)]
        self.tokenizer = load_tokenizer(str(folder))
        self.store = FolderStore(images)
        data = data_flags(self.config)
        self.decoder = ImageDecoder(
            self.config.image,
            aspect_ratio=data.image_aspect_ratio,
            transparency=data.image_transparency,
            orientation=data.image_orientation,
            layout=self.config.image_layout,
            backend="pillow",
            num_threads=4,
        )
        self.template = find_template(data.version)
        self.template.check(self.tokenizer)
        self.stop_ids = self.template.stop_ids(self.tokenizer)
        self.model = _load_model(folder, self.config, self.dtype).to(self.device).eval()

    def answer(self, questions: Iterable[Question], settings: GenerationSettings) -> Iterator[Answer]:
        """One answer for each question, in their order. The next batch is read while one is generated."""
        batches = _batched(questions, settings.batch_size)
        with ThreadPoolExecutor(1, thread_name_prefix="batch-reader") as reader:
            waiting = next(batches, None)
            ahead = None if waiting is None else reader.submit(self._prepare, waiting)
            while ahead is not None:
                prepared = ahead.result()
                waiting = next(batches, None)
                ahead = None if waiting is None else reader.submit(self._prepare, waiting)
                yield from self._answer_batch(prepared, settings)

    def close(self) -> None:
        """Ends the threads that decode images."""
        self.decoder.close()

    def rows(self, prompt: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """[L] token ids of a whole prompt, `<image>`'s id in all rows of its image. Raises UnusableSample.

        Args:
            size: (width, height) of the image in pixels, for a model whose images' rows follow from it.
        """
        return prompt_rows(prompt, self.tokenizer, self.config, size)

    def _prepare(self, questions: Sequence[Question]) -> "list[_Asked | str]":
        """What each question asks, or why it cannot be put."""
        images = read_images((question.image for question in questions), self.store, self.decoder)
        prepared: list[_Asked | str] = []
        for question in questions:
            if (reason := images.reasons.get(question.image)) is not None:
                prepared.append(f"{question.image}: {reason}")
                continue
            size, views = images.sizes[question.image], images.places[question.image]
            try:
                rows = self.rows(question.prompt, size)
            except UnusableSample as error:
                prepared.append(str(error))
                continue
            prepared.append(_Asked(rows, images.pixel_values[views.start : views.stop], size))
        return prepared

    def _answer_batch(self, prepared: "Sequence[_Asked | str]", settings: GenerationSettings) -> Iterator[Answer]:
        good = [item for item in prepared if not isinstance(item, str)]
        answers = iter(self._generate(good, settings) if good else ())
        for item in prepared:
            yield Answer(text="", error=item) if isinstance(item, str) else next(answers)

    @torch.inference_mode()
    def _generate(self, batch: "Sequence[_Asked]", settings: GenerationSettings) -> list[Answer]:
        from transformers import GenerationConfig

        ids, mask = left_padded([asked.rows for asked in batch], self.tokenizer.pad_id)
        # How many tokens each answer has until the model would no longer see its own prompt.
        limit, what = context_of(self.config)
        room = [limit - len(asked.rows) for asked in batch]
        # Made anew: an export's own generation settings may ask for sampling.
        generation = GenerationConfig(
            do_sample=False,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_id,
        )
        try:
            output = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                **self._images_of(batch),
                generation_config=generation,
                stopping_criteria=self._stopping_criteria(ids.shape[1], room),
                logits_processor=[self._refuse_not_finite],
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"out of GPU memory with --batch-size {settings.batch_size}: repeat the command with a smaller one, it "
                "goes on where this one stopped"
            ) from None
        answers = []
        for row, left in zip(output[:, ids.shape[1] :].tolist(), room, strict=True):
            text, ended = self._text(row[:left])
            cut = None if ended or left >= settings.max_new_tokens else f"the answer ends at {what}"
            answers.append(Answer(text=text, error=None, cut=cut))
        return answers

    def _images_of(self, batch: "Sequence[_Asked]") -> dict[str, Tensor]:
        """What transformers' model takes of the images: without tiles one view of each."""
        views = pad_sequence([asked.views for asked in batch], batch_first=True).to(self.device, self.dtype)
        if self.config.tiles is None:
            return {"pixel_values": views[:, 0]}
        sizes = [asked.size[::-1] for asked in batch]
        return {"pixel_values": views, "image_sizes": torch.tensor(sizes, device=self.device)}

    def _refuse_not_finite(self, ids: Tensor, scores: Tensor) -> Tensor:
        # -inf is legitimate: what generation rules out.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NotFinite(
                f"{self.folder}: the model's logits are not finite (NaN or infinity): its weights are damaged, its "
                "training diverged, or its numbers are too large for --dtype; evaluate another checkpoint or dtype"
            )
        return scores

    def _stopping_criteria(self, prompt_length: int, room: list[int]) -> list[Callable[..., Tensor]]:
        """Stops where a template ends its answers by a text, in EOS's place, and where the model's context ends.

        transformers' `stop_strings` would not see a text where a tokenizer spells it in bytes.

        Args:
            room: tokens that there are for each answer.
        """
        end = self.template.end

        def ended(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            texts = [self.tokenizer.decode(row) for row in ids[:, prompt_length:].tolist()]
            return torch.tensor([end in text for text in texts], device=ids.device)

        def full(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            said, rows = ids.shape[1] - prompt_length, ids.shape[0] // len(room)  # several of each for beams
            return torch.tensor([said >= left for left in room for _ in range(rows)], device=ids.device)

        return [full] if end is None else [ended, full]

    def _text(self, row: list[int]) -> tuple[str, bool]:
        """The answer in so many tokens, and whether the model has ended it."""
        stop = next((at for at, token in enumerate(row) if token in self.stop_ids), None)
        text, mark = self.tokenizer.decode(row[:stop]), self.template.end
        text, found, _ = text.partition(mark) if mark is not None else (text, "", "")
        return text.strip(), stop is not None or bool(found)


def context_of(config: ModelConfig) -> tuple[int, str]:
    """How many rows a prompt and its answer may have together, and what that is in words."""
    window, positions = config.language.sliding_window, config.language.max_position_embeddings
    if window is not None and window < positions:
        return window, f"the model's sliding window of {window} tokens"
    return positions, f"the model's context of {positions} tokens"


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question that can be put."""

    rows: np.ndarray
    """[L] token ids of the prompt."""
    views: Tensor
    """float32 [n, 3, S, S] of its image."""
    size: tuple[int, int]
    """(width, height) of it."""


def prompt_rows(
    prompt: str, tokenizer: Tokenizer, config: ModelConfig, size: tuple[int, int] | None = None
) -> np.ndarray:
    """int64 [L] rows of the prompt up to the answer in the model's own template, exactly as a training dialogue begins.

    An image tag in the prompt is taken out, since the image stands at the front. Raises UnusableSample for a text that
    does not tokenize, or leaves no room for an answer in what the model sees.
    """
    message = f"{IMAGE_TAG}\n{prompt.replace(IMAGE_TAG, '')}"
    sample = Sample(
        sample_id=0,
        name="question",
        images=("image",),
        conversations=(("human", message), ("gpt", "")),
        caption=None,
        hallucinated_captions=(),
        source="",
    )
    limit, what = context_of(config)
    settings = EncodingSettings(
        version=data_flags(config).version, model_max_length=limit, image_layout=config.image_layout
    )
    encoded = encode(sample, tokenizer, settings, [size])
    if encoded.truncated or len(encoded.dialogue) == limit:
        raise UnusableSample(f"the prompt leaves no room for an answer in {what}")
    return np.where(encoded.dialogue == IMAGE, config.extra["image_token_index"], encoded.dialogue)


def left_padded(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [n, longest], of prompts that all end in the last column."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.from_numpy(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask


def read_export(folder: Path) -> ModelConfig:
    """Sizes of an exported model. Raises ValueError for a folder of any other layout."""
    config = read_model_config(folder)
    if config.extra.get("layout") != "hf":
        raise ValueError(
            f"--hf {folder}: found a model in another layout, expected LlavaForConditionalGeneration, LlavaNext's, "
            "LlavaOnevision's or Blip2ForConditionalGeneration; export it with tools/convert_megatron_to_hf.py "
            "--format hf"
        )
    return config


def _load_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    import transformers

    if config.tiles is not None:
        name = "LlavaNext" if config.tiles.max_tiles is None else "LlavaOnevision"
    else:
        name = "Llava" if config.qformer is None else "Blip2"
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    try:
        model, report = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"--hf {folder}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from None
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers for these.
        raise ValueError(f"--hf {folder}: {len(missing)} weights are missing, such as {missing[0]}; export it again")
    return model


def _batched(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    for question in questions:
        batch.append(question)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
