"""A ticket office in three processes: an HTTP API, a worker, and a payment provider that misbehaves."""
