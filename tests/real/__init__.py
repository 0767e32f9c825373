"""Real weights in, through a few steps, and out again: what random weights of real shapes cannot show."""
