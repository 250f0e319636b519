"""Dense models into sparse ones, and back: on disk (streamed) and live."""
