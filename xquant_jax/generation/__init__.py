"""From prompts to answers."""
