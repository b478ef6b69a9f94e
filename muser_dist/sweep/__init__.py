"""Sweeps over any field of a run's config with Ray Tune; each trial is a whole run."""
