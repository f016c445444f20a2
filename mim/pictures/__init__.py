"""Pictures: what they are of, and how they are drawn."""
