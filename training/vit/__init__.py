"""Images -> a gated ViT."""
