"""How files become conversations: archives, layouts, formats, findings."""
