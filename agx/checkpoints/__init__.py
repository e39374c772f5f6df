"""In: a run's messages and tool results as they appear. Out: checkpoints, and from them a run that can go on."""
