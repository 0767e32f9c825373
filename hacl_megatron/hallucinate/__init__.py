"""Hallucinated captions for LLaVA JSON files, by rules (`rules`) or by a language model (`llm`)."""
