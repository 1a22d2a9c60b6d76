"""A text encoder with classes on top: the fine-tuning of every encoder of this room, and their baseline."""
