"""The report: its numbers in Python, its page in a browser."""
