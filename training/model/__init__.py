"""The networks: a gated ViT and its autoencoders, their compute, and their answers."""
