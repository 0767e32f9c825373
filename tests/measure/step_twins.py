"""The side of `measure_preference.py` that is not ours: dpo as trainers on transformers take the step."""

from pathlib import Path

from tests.measure.step_sides import NEWLINE, TakeStep, Work, draw_samples


def passes_side(work: Work, *, with_reference: bool) -> TakeStep:
    """Chosen and rejected dialogues padded into one batch, whole logits, the language-model loss of the chosen.

    Args:
        with_reference: the reference's forward pass over the same batch belongs to the step.
    """
    import copy

    import torch
    from torch.nn import functional as F
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(
        Path(work.folder), dtype=torch.float32, attn_implementation="sdpa"
    )
    reference = copy.deepcopy(llava).requires_grad_(False) if with_reference else None
    llava.requires_grad_(not work.frozen)
    llava.model.vision_tower.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    config = llava.config
    texts, pixels = draw_samples(work, config.text_config.vocab_size, config.vision_config.image_size)
    dialogues, begins = [], []
    for answers in ([text.caption for text in texts], [text.hallucinated[0] for text in texts]):
        for text, answer in zip(texts, answers, strict=True):
            before = [*text.prefix, *[config.image_token_id] * config.image_seq_length]
            dialogues.append(torch.tensor([*before, *answer, NEWLINE]))
            begins.append(len(before))
    ids = torch.nn.utils.rnn.pad_sequence(dialogues, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(rows) for rows in dialogues], batch_first=True)
    answers = mask.clone()
    for row, begin in zip(answers, begins, strict=True):
        row[:begin] = 0
    optimizer = torch.optim.AdamW([one for one in llava.parameters() if one.requires_grad], lr=1e-3, weight_decay=0.0)

    def token_likelihoods(model):
        logits = model(
            input_ids=ids, attention_mask=mask, pixel_values=torch.cat([pixels, pixels]), use_cache=False
        ).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return found * answers[:, 1:]

    def take_step() -> dict[str, float]:
        likelihoods = token_likelihoods(llava)
        chosen, rejected = likelihoods.sum(1).chunk(2)
        then = (-300.0, -300.0)
        if reference is not None:
            with torch.no_grad():
                then = token_likelihoods(reference).sum(1).chunk(2)
        preference = -F.logsigmoid(0.1 * ((chosen - then[0]) - (rejected - then[1]))).mean()
        language = -likelihoods.chunk(2)[0].sum() / answers.chunk(2)[0][:, 1:].sum()
        (language + preference).backward()
        torch.nn.utils.clip_grad_norm_(llava.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"lm loss": language.item(), "preference loss": preference.item()}

    return take_step
