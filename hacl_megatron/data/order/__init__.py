"""Which samples a step takes, and which rank and micro-batch takes each."""
