"""The PostgreSQL backend: one server-side function per method of the contract."""
