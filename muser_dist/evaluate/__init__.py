"""Scores of a trained model, each next to what chance would reach, and the page that shows a run."""
