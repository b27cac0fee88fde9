"""One cell to one record: suites, the protocol, controls, keys, the store."""
