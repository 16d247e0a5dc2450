"""Replicas of a server on Ray Serve, each adapter at home on few of them."""
