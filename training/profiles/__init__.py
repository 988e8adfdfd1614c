"""Autoencoders -> steering profiles, for classes and contexts."""
