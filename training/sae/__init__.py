"""The residuals that gates read -> autoencoders, and their fidelity."""
