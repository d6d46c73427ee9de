"""Training SRCNN: the recipe, patches, optimizer, checkpoints and logs."""
