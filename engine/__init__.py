"""What any run needs, whichever stage it is. Nothing here knows text or tells stages apart."""
