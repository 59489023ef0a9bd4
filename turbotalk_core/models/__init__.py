"""Networks: Wan 2.1's transformer with InfiniteTalk's audio attention, the VAE, their files."""
