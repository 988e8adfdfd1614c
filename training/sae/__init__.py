"""The residuals that gates read -> autoencoders, and how faithful these are."""
