"""Metrics of captions: `scoring` has the registry and scores whole splits; training needs `cider` and `words` alone."""
