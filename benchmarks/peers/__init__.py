"""The methods and kernels of other projects, as contestants."""
