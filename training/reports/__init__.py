"""Studies, their results, and the pages made from them."""
