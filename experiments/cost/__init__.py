"""What a natural-gradient step costs: its linear algebra, its growth with width, its memory."""
