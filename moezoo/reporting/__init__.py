"""Reports of what experts do: data taken from traces, one page that shows it, and live training."""
