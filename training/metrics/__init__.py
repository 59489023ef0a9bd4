"""Generated videos measured against real ones, with the metrics of the literature."""
