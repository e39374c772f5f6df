"""In: submitted jobs, and runs whose process died. Out: runs, in whichever worker has a free slot."""
