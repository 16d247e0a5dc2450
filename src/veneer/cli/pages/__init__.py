"""Help page of each verb: its arguments, options and help, and checks that need no model. Nothing here
imports torch.
"""
