"""Every schedule against its simulation, and against torch's."""
