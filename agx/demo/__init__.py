"""`agx demo`: the whole flow on one machine, and a check that the metrics are equal to the runs.

scenarios -> scripted or real model -> agents -> traffic (here, or in a process to be killed) -> finished runs
                                                     |                   (a worker resumes some)      |
                                                 listener -> screen     sidecar's /metrics -> comparison
"""
