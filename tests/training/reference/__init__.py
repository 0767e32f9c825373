"""Tests of `hacl_megatron.training.reference`."""
