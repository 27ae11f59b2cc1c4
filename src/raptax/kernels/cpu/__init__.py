"""The native kernels: C++ on CPUs, called through the XLA FFI."""
