"""A real Flower deployment on loopback; its parts are in examples/deployment."""
