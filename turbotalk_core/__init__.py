"""TurboTalk's core: a portrait and a voice become a talking video. Knows no host."""
