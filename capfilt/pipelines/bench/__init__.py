"""The verb bench."""
