"""Training: from a recipe to weights, with or without a regulariser."""
