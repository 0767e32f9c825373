"""What is allowed and seldom meant: flags of the one stage in a run of the other."""

from hacl_megatron.config.run import RunConfig

_REAL_WIDTH = 1024
"""Hidden size from which on a language model is one that the usual rates are for."""
_HIGHEST_WHOLE, _LOWEST_CONNECTOR = 2e-4, 5e-5
"""LLaVA's rates are 2e-5 for the whole language model and 1e-3 for the connector alone."""


def doubts(config: RunConfig) -> list[str]:
    """Lines for the user, of a configuration whose model is known."""
    lines, rate = [], config.optimizer.lr
    trains_all = not config.language_model_is_frozen
    if config.data.version == "plain" and trains_all:
        lines.append(
            "note: --version plain without --freeze-LM trains the language model on bare captions, with no question; "
            "stage 1 of LLaVA trains the connector alone: add --freeze-LM if this is one"
        )
    if config.architecture.language.hidden_size < _REAL_WIDTH:
        return lines
    if trains_all and rate > _HIGHEST_WHOLE:
        lines.append(
            f"note: --lr {rate:g} is for the whole language model here, which LLaVA trains at 2e-5; 1e-3 is stage 1's, "
            "with --freeze-LM"
        )
    if config.language_model_is_constant and rate < _LOWEST_CONNECTOR and config.optimizer.connector_lr is None:
        lines.append(
            f"note: --lr {rate:g} is for the connector alone here, which LLaVA trains at 1e-3; 2e-5 is stage 2's, "
            "without --freeze-LM"
        )
    return lines
