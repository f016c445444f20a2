"""What a finished backbone is handed over in: folders, cards, and their way back in."""
