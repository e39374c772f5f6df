"""In: leases past their deadline. Out: the end of each run whose process died."""
