"""Images: where they come from, how they are split and held, and the batches of a training."""
