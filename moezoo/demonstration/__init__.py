"""The main job at a size that fits a coffee break: what `moezoo demo` runs between its prints."""
