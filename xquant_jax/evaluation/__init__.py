"""How accurate a model is when it sees through a cache."""
