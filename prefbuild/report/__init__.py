"""Pictures and pages: what a build made, for people."""
