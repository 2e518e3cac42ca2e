"""A run: its folder, its checkpoints, and the model and networks that its settings describe."""
