"""The console: live and recent runs as pages, and a button that cancels. It keeps nothing of its own.

browser -> console (routes) -> auth
                            -> overview (leases, newest facts) -> front
                            -> trail (a run's facts and stream) -> run_page
                            -> cancel (the same mark as agx.cancel)
"""
