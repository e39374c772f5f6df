"""Recording: what happens in one run becomes events, facts and spans."""
