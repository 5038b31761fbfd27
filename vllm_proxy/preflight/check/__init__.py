"""Can this configuration run here? Every problem with its remedy, before any weight is read."""
