"""How networks are trained: recipes, the one loop, resuming, batch-norm recalibration."""
