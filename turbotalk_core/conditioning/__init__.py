"""What a video is conditioned on besides the voice: reference image, regions, prompts."""
