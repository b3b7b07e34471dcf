"""The built-in data set: drawn cats and dogs."""
