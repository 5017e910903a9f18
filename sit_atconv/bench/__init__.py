"""How long things take, and what they were measured on."""
