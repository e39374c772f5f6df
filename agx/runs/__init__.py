"""In: an agent and its session. Out: one run, driven, recorded and ended, whatever happens."""
