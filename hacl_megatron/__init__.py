"""hacl_megatron: Hallucination Augmented Contrastive Learning on Megatron parallelism."""

__version__ = "0.1.0"
