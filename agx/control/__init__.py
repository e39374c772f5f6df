"""In: what other processes ask of a session. Out: a cancel, a message, a place behind the live run, a score."""
