"""In: facts, leases, session streams. Out: pages that show live and recent runs, and a button that cancels.

browser -> app (routes) -> auth
                        -> overview (leases, newest facts) -> index_page
                        -> run_history (a run's facts and stream) -> waterfall, event_log -> run_page
                        -> cancel (the same mark as agx.cancel)
"""
