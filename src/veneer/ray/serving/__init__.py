"""Replicas of a server on Ray Serve, with each adapter on few of them."""
