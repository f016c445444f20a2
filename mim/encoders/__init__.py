"""Encoders: one file a family; the file's name is its name in a recipe."""
