"""Measured claims: how fast, how accurate, at what price; see README.md in this folder."""
