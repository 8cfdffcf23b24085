"""Networks: one file per family, and what is needed to build, load, store and use them."""
