"""The methods: what is learnt from a batch, each in a file of its own."""
