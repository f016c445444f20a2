"""Objectives: one file each; the file's name is its name in a recipe."""
