"""The networks: a gated ViT, its autoencoders, what they cost, and what they answer."""
