"""Pure functions of tensors and records: gates, assignments, queues, dispatch and combine,
losses.
"""
