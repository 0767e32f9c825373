"""Which parts of a micro-batch run ahead of the main pass, and which of those it need not repeat.

weight 0       dialogues alone: plain LLaVA
LLM constant   texts run once, forward only: no trained parameter is on their way but the text head's, so their EOS
               states are kept, and the main pass holds dialogues and images alone. On one pipeline stage they run when
               the main pack's pass is under way, so that a GPU has work while the host launches them
global pool    with negatives from several micro-batches, images and texts run ahead too, for the embeddings that
               the loss needs before any of them can get a gradient (gradient caching, Gao et al. 2021)
"""

from hacl_megatron.batch import PackPlan, Parts
from hacl_megatron.config.run import RunConfig


def pool_spans_micro_batches(config: RunConfig, num_micro_batches: int) -> bool:
    """Whether a pair's negatives come from other micro-batches of the step too, so that the loss must wait for them."""
    return num_micro_batches > 1 and config.objective.contrastive_negatives != "micro-batch"


def pack_plan(config: RunConfig, num_micro_batches: int, *, with_gradients: bool) -> PackPlan:
    """The packs of each micro-batch of a step with `num_micro_batches`; `with_gradients` is False for validation."""
    twins = "none" if config.preference.preference_loss == "none" else "branch"
    if config.objective.contrastive_weight == 0:  # LLaVA's own training: nothing would come of the pairs
        return PackPlan(main=Parts(images="none", texts=False, preferences=twins))
    images = "branch" if config.objective.contrastive_image_context == "prompt" else "segment"
    texts_are_constant = config.language_model_is_constant
    caches_gradients = with_gradients and pool_spans_micro_batches(config, num_micro_batches)
    if caches_gradients and has_dropout(config):
        # Both passes must draw the same masks, so they must run the same rows.
        everything = Parts(images=images, preferences=twins)
        return PackPlan(main=everything, ahead=everything)
    if caches_gradients:
        ahead = Parts(dialogues=False)
    elif texts_are_constant:
        ahead = Parts(dialogues=False, images="none")
    else:
        ahead = None
    return PackPlan(main=Parts(images=images, texts=not texts_are_constant, preferences=twins), ahead=ahead)


def has_dropout(config: RunConfig) -> bool:
    """Whether the LLaMA draws random numbers. (Packed attention knows no dropout.)"""
    of_lora = config.lora.lora_dropout if config.lora.lora_rank is not None else 0.0
    return float(config.transformer.get("hidden_dropout", 0.0)) > 0 or of_lora > 0
