"""The lock that keeps a run folder to one driver, its heartbeat, and how a driver that lost it is stopped."""
