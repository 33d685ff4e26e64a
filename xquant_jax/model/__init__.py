"""The transformer, its weights and what is loaded with them."""
