"""The synthetic talking-avatar set: pictures, speech and the mouth that follows it."""
