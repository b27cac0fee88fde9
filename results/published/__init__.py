"""Published results, so that an installed package can compare with them and cite them."""
