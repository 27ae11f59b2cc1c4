"""Other libraries' names for what raptax does under its own."""
