"""Systems that learn from text, and what they share."""
