"""Many pipelines in one recipe: their language, the commands that they come to, and the order of carrying them out."""
