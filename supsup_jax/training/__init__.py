"""Learning a task: in one scan, from batches as they arrive, from a stream that names no task."""
