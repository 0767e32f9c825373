"""A LLaMA-style SentencePiece model whose every piece is known, so that token rows can be worked out by hand.

Written piece by piece instead of trained: training may give other pieces in another version of sentencepiece. As in
Vicuna's vocabulary, "▁USER" is two pieces ("▁US", "ER") and "USER" behind a special token is one.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant The assistant gives helpful detailed "
    "polite answers to the questions ASSISTANT cat red dog US yes it is What"
)
"""Each is one piece with a space before it; all else falls back to characters, or to bytes."""

CHAT = """{% for message in messages %}{{ message.role + ': ' + message.content }}{% if message.role == 'assistant' %}
{{- eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
"""A chat template for it."""


def write_tokenizer(
    folder: Path,
    *,
    legacy: bool | None,
    user_piece: bool = True,
    spaced_user_piece: bool = False,
    with_config: bool = True,
    **config,
) -> str:
    """Writes tokenizer.model and tokenizer_config.json; `legacy=None` leaves the key out.

    `user_piece`, `spaced_user_piece`: whether "USER" and "▁USER" are pieces, as the first is of Vicuna's vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_model(user_piece, spaced_user_piece).SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {} if legacy is None else {"legacy": legacy}
    if with_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return str(folder)


def _model(user_piece: bool, spaced_user_piece: bool) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece

    def add(piece: str, kind: int, score: float = 0.0) -> None:
        model.pieces.add(piece=piece, type=kind, score=score)

    add("<unk>", kinds.UNKNOWN)
    add("<s>", kinds.CONTROL)
    add("</s>", kinds.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", kinds.BYTE)
    # BPE merges pairs whose join is a piece, best score first: a word needs every prefix.
    merges: dict[str, None] = {}
    for word in WORDS.split():
        merges.update(dict.fromkeys(f"▁{word}"[:end] for end in range(2, len(word) + 2)))
    merges.update(dict.fromkeys(["US", "ER", "USER"][: 3 if user_piece else 2]))
    merges.update(dict.fromkeys(["▁USER"] if spaced_user_piece else []))
    merges.update(dict.fromkeys(["Wh", "Wha", "What"]))
    for rank, piece in enumerate(merges):
        add(piece, kinds.NORMAL, -float(rank))
    characters = sorted(set("".join(merges)) | set(".,:?'USERbdfhjklmvwxz"))
    for rank, character in enumerate(characters):
        add(character, kinds.NORMAL, -float(len(merges) + rank))

    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model
