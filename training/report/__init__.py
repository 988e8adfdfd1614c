"""Measurements -> pages and pictures."""
