"""Which frames each sampling run makes, and which of them go into the video."""
