"""One training loop for all recipes: launch, loop, step, engine."""
