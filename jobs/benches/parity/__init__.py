"""Every layout against one plain process."""
