"""Images: their sources, splits and storage, and the batches of training."""
