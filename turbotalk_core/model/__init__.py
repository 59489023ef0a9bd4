"""The networks: the Wan 2.1 transformer with InfiniteTalk's audio attention, its VAE, their files."""
