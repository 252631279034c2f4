"""The decoder under the names of Transformers' architectures, in both directions."""
