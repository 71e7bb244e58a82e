PATIENCE = 500.0
"""Seconds to wait for another process or thread: no test is in a hurry, however busy the machine.
Less than pytest's own limit of 600, so that what the process has said is shown."""
