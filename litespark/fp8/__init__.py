"""FP8 policy: recipes, scales, and the number format of each linear layer."""
