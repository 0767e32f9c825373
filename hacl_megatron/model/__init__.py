"""The model: architecture alone. What trains, what is loaded and where it runs is decided elsewhere.

hacl.py      the assembled model, one pipeline stage; read it first     heads.py      W_v, W_t and the temperature
vision.py    CLIP on megatron-core                                      hf_parts.py   transformers' towers, Q-Former
llama.py     one stage of the language model                            lora.py       adapters beside its layers
connector.py linear, mlpNx_gelu                                         transformer_configs.py   for megatron-core
fresh.py     initial values without the model                           init.py       seeded initial values
"""
