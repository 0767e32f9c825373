"""A tokenizer of LLaMA's kind, trained on the drawn sentences."""

import json
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizerFast

VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)
"""What LLaVA-1.5's dialogues put around questions and answers."""
MINIGPT4_PROMPT = "###Human: <Img></Img> ###Assistant:"
"""What MiniGPT-4's do."""
LLAVA_TOKENS = {"image_token": "<image>"}
"""LLaVA's processor asks the tokenizer for this name; BLIP-2's stumbles over it (transformers 5.23)."""


def train_tokenizer(
    sentences: list[str], prompt: str = VICUNA_PROMPT, named_tokens: dict[str, str] = LLAVA_TOKENS
) -> LlamaTokenizerFast:
    """A BPE with byte fallback in LLaMA's pipeline; ids 0-2 are <unk>, <s>, </s>, the last two <image>, <pad>.

    A space is prepended and spaces become '▁', as LLaMA does. The training text is cut into words and signs, so
    that no merge crosses them and 'star' is the same token before a full stop. The space before USER is cut off too,
    so that '▁USER' is one piece more than 'USER', as in Vicuna's vocabulary: LLaVA's v1 template counts on it, and
    ignores all labels of a dialogue of several rounds otherwise.
    """
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=specials + byte_tokens, show_progress=False)
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    text = (f"▁{word}" for line in [*sentences, prompt] for word in line.split())
    learner.train_from_iterator((piece for word in text for piece in re.findall(r"▁(?=USER)|▁?\w+|\W", word)), trainer)

    trained = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    model = models.BPE(vocab=trained["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([*specials, "<image>", "<pad>"])
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=2048, padding_side="left", extra_special_tokens=named_tokens, legacy=False,
    )  # fmt: skip
